"""A small platform with two investors and staff in it, to be attacked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from equitie_data import acting_as

if TYPE_CHECKING:
    import psycopg

    from equitie_data import Database

__all__ = ["World"]


class World:
    """A database with two investors and staff in it."""

    def __init__(self, owner: psycopg.Connection[Any], database: Database) -> None:
        self.owner = owner
        self.database = database
        self.users: dict[str, UUID] = {}
        self.investors: dict[str, int] = {}
        self.transactions: dict[str, int] = {}
        deal = self.one("INSERT INTO public.deals_clean (deal_name) VALUES ('Deal') RETURNING deal_id")
        for name, role in {"ada": "investor", "bob": "investor", "ann": "analyst", "root": "admin"}.items():
            self.users[name] = uuid4()
            investor = None
            if role == "investor":
                investor = self.one(
                    "INSERT INTO public.investors_clean (full_name, primary_email) VALUES (%s, %s)"
                    " RETURNING investor_id",
                    name,
                    f"{name}@example.com",
                )
                self.investors[name] = investor
                self.transactions[name] = self.one(
                    "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount)"
                    " VALUES (%s, %s, current_date, %s) RETURNING transaction_id",
                    deal,
                    investor,
                    111 if name == "ada" else 222,
                )
            owner.execute(
                "INSERT INTO public.user_profiles (user_id, email, role, investor_id) VALUES (%s, %s, %s, %s)",
                [self.users[name], f"{name}@example.com", role, investor],
            )
        self.deal = deal

    def one(self, statement: str, *params: Any) -> Any:
        row = self.owner.execute(statement, params).fetchone()
        assert row is not None
        return row[0]

    def run(self, name: str, operation: Any, params: Any = None) -> Any:
        """Write as somebody."""
        with acting_as(self.users[name]):
            return self.database.execute_write(operation, params)
