"""A migrated database with two investors, staff of each kind, and a way to speak as any of them."""

from __future__ import annotations

import contextlib
import json
import uuid
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest

from equitie_data import _sql
from equitie_data.migrations import current, directories, files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from equitie_data.migrations.files import Migration

PEOPLE = {
    "investor_a": "investor",
    "investor_b": "investor",
    "inactive_admin": "admin",
    "analyst": "analyst",
    "manager": "manager",
    "auditor": "auditor",
    "admin": "admin",
    "superadmin": "superadmin",
    "viewer": "viewer",
}


@attrs.frozen
class Platform:
    """A database with people in it.

    Attributes:
        owner: an autocommit connection of the owner.
        app: an autocommit connection of the application's login role.
        ids: the keys of what is there.
    """

    owner: psycopg.Connection[Any]
    app: psycopg.Connection[Any]
    ids: dict[str, int]

    @staticmethod
    def user_id_of(person: str) -> uuid.UUID:
        """Return the login of a person, whether they exist or not."""
        return uuid.uuid5(uuid.NAMESPACE_DNS, f"{person}.example")

    @contextlib.contextmanager
    def acting(self, person: str | None, **context: str) -> Iterator[psycopg.Connection[Any]]:
        """Begin the transaction the library would begin for a person, or for the service when there is none."""
        with self.app.transaction():
            if person is None:
                claims, role = "", "service_role"
                context = {"actor": "service", "reason": "a test", **context}
            else:
                user_id = str(self.user_id_of(person))
                claims = json.dumps({"sub": user_id, "role": "authenticated"})
                context = {"actor": "user", "user_id": user_id, **context}
                found = self.app.execute("SELECT equitie_private.database_role(%s)", (user_id,)).fetchone()
                assert found is not None
                role = found[0]
            self.app.execute(
                "SELECT set_config('request.jwt.claims', %s, true), set_config('equitie.context', %s, true),"
                " set_config('role', %s, true)",
                (claims, json.dumps(context), role),
            )
            yield self.app

    def one(self, query: str, *params: Any) -> Any:
        """Return the only value of the only row, as the owner."""
        row = self.owner.execute(query, params).fetchone()
        assert row is not None
        return row[0]

    def rows(self, query: str, *params: Any) -> list[Any]:
        """Return all rows, as the owner."""
        return self.owner.execute(query, params).fetchall()

    def events_after(self, mark: int, *columns: str) -> list[Any]:
        """Return the events of the audit log that came after a mark, in order."""
        return self.rows(
            f"SELECT {', '.join(columns)} FROM public.audit_logs WHERE audit_id > %s ORDER BY audit_id", mark
        )

    def mark(self) -> int:
        """Return the number of the newest event."""
        return int(self.one("SELECT coalesce(max(audit_id), 0) FROM public.audit_logs"))


@pytest.fixture
def platform(owner_dsn: str, app_dsn: str) -> Iterator[Platform]:
    with (
        psycopg.connect(owner_dsn, autocommit=True) as owner,
        psycopg.connect(app_dsn, autocommit=True) as app,
    ):
        ids: dict[str, int] = {}

        def add(name: str, statement: str, *params: Any) -> None:
            row = owner.execute(statement, params).fetchone()
            assert row is not None
            ids[name] = row[0]

        add("company", "INSERT INTO companies_clean (company_name) VALUES ('Acme') RETURNING company_id")
        for deal in ("deal_a", "deal_b"):
            add(
                deal,
                "INSERT INTO deals_clean (deal_code, deal_name, underlying_company_id) VALUES (%s, %s, %s)"
                " RETURNING deal_id",
                deal,
                deal,
                ids["company"],
            )
        for person, role in PEOPLE.items():
            if role == "investor":
                add(person, "INSERT INTO investors_clean (full_name) VALUES (%s) RETURNING investor_id", person)
            owner.execute(
                "INSERT INTO user_profiles (user_id, email, role, investor_id, is_active) VALUES (%s, %s, %s, %s, %s)",
                (
                    Platform.user_id_of(person),
                    f"{person}@example.com",
                    role,
                    ids.get(person),
                    person != "inactive_admin",
                ),
            )
        for letter in ("a", "b"):
            for number in range(3):
                add(
                    f"transaction_{letter}{number}",
                    "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
                    " VALUES (%s, %s, current_date + %s, 100) RETURNING transaction_id",
                    ids[f"deal_{letter}"],
                    ids[f"investor_{letter}"],
                    31 * number,
                )
        yield Platform(owner, app, ids)


@pytest.fixture
def add_transactions() -> Callable[[Platform, int], None]:
    """Insert rows of investor A over a few months, with one statement of the owner."""

    def add(platform: Platform, count: int) -> None:
        platform.owner.execute(
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT %s, %s, current_date + g %% 90, g FROM generate_series(1, %s) AS g",
            (platform.ids["deal_a"], platform.ids["investor_a"], count),
        )

    return add


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Migration, ...]]:
    """Have this release ship other migrations: given texts by name, after the given number of real ones."""

    def ship(texts: dict[str, str], *, real: int = 0) -> tuple[Migration, ...]:
        kept = {
            name: text
            for name, text in _sql.migration_texts().items()
            if real >= int(name[:4]) and name.partition(".")[0] not in texts
        }
        shipped = directories.read_directory(files.OURS, {**kept, **texts}, "sql/migrations")
        for module in (directories, current):
            monkeypatch.setattr(module, "ours", lambda: shipped)
        return shipped.migrations

    return ship


@pytest.fixture
def owner(empty_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection of the owner of `empty_dsn`."""
    with psycopg.connect(empty_dsn, autocommit=True) as conn:
        yield conn
