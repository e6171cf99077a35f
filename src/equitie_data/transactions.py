"""What can be done to a transaction of which the id is known: ``Database.transactions``.

An id carries the day its transaction was made for, so a lookup names the month and reads one partition (see
docs/explanation/transaction-ids.md).
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from psycopg.rows import tuple_row

from equitie_data import _sql
from equitie_data.errors import ConfigurationError, TransactionNotFoundError
from equitie_data.transaction_id import day_of
from equitie_data.transaction_row import (
    BY_ID,
    CORRECT_DATE,
    IDS,
    PLACE,
    ROWS,
    TransactionRow,
    by_id_in_month,
    checked_id,
    places,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from psycopg import Connection

    from equitie_data.routing import Consistency

__all__ = ["Transactions"]


class Transactions:
    """Finds transactions by their ids, as whoever is acting: those of others are not found.

    Args:
        execute_read: `Database.execute_read`.
        execute_write: `Database.execute_write`.
    """

    def __init__(self, execute_read: Callable[..., Any], execute_write: Callable[..., Any]) -> None:
        self._execute_read = execute_read
        self._execute_write = execute_write

    def get(
        self, transaction_id: int, *, consistency: Consistency = "session", timeout: float | None = None
    ) -> TransactionRow | None:
        """Return a transaction, or ``None`` if there is none with this id that the acting user may see.

        One round trip, and a second one if the transaction does not stand on the day its id carries.

        Args:
            transaction_id: Its id.
            consistency: As in `Database.execute_read`.
            timeout: As in `Database.execute_read`.
        """
        if checked_id(transaction_id) not in IDS:
            return None
        day = day_of(transaction_id)
        rows: list[TransactionRow] = []
        if day is not None:
            rows = self._execute_read(
                by_id_in_month(day.year, day.month),
                [transaction_id],
                name="transactions.get",
                consistency=consistency,
                timeout=timeout,
                row_factory=ROWS,
            )
        if not rows:
            # Looks once more on the day itself: the transaction may have come back to it in between.
            rows = self._execute_read(
                BY_ID,
                [transaction_id],
                name="transactions.get",
                consistency=consistency,
                timeout=timeout,
                row_factory=ROWS,
            )
        return rows[0] if rows else None

    def get_many(
        self, transaction_ids: Iterable[int], *, consistency: Consistency = "session", timeout: float | None = None
    ) -> dict[int, TransactionRow]:
        """Return those of several transactions that exist and may be seen, by id, in the order asked for.

        All in one snapshot. One round trip, and two more if some do not stand on the days their ids carry.

        Args:
            transaction_ids: Their ids, any number of them.
            consistency: As in `Database.execute_read`.
            timeout: As in `Database.execute_read`.
        """
        wanted = list(dict.fromkeys(each for each in map(checked_id, transaction_ids) if each in IDS))
        if not wanted:
            return {}

        def operation(connection: Connection[Any]) -> dict[int, TransactionRow]:
            found: dict[int, TransactionRow] = {}
            days = {each: day for each in wanted if (day := day_of(each)) is not None}
            rows = connection.cursor(row_factory=ROWS)
            if days:
                # Not prepared: a plan kept for any days would lock every partition.
                rows.execute(_sql.query("transactions_at_places"), places(days), prepare=False)
                found = {row.transaction_id: row for row in rows.fetchall()}
            missing = [each for each in wanted if each not in found]
            if missing:
                strays = connection.cursor(row_factory=tuple_row)
                strays.execute(_sql.query("transactions_stray_places"), [missing])
                days = dict(strays.fetchall())
                if days:
                    rows.execute(_sql.query("transactions_at_places"), places(days), prepare=False)
                    found.update({row.transaction_id: row for row in rows.fetchall()})
            return {each: found[each] for each in wanted if each in found}

        found: dict[int, TransactionRow] = self._execute_read(
            operation, name="transactions.get_many", consistency=consistency, timeout=timeout
        )
        return found

    def correct_date(
        self,
        transaction_id: int,
        new_date: dt.date,
        *,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> TransactionRow:
        """Correct a transaction's date; its id stays, and finds it as before.

        Args:
            transaction_id: Its id.
            new_date: The day it should have had.
            idempotency_key: As in `Database.execute_write`.
            timeout: As in `Database.execute_write`.

        Returns:
            The corrected row.

        Raises:
            TransactionNotFoundError: There is no such transaction, or the acting user may not change it.
        """
        if isinstance(new_date, dt.datetime) or not isinstance(new_date, dt.date):
            raise ConfigurationError("The new date must be a datetime.date: a time of day has no place in it.")
        if checked_id(transaction_id) not in IDS:
            raise TransactionNotFoundError

        def operation(connection: Connection[Any]) -> tuple[Any, ...]:
            place, before = day_of(transaction_id), None
            cursor = connection.cursor(row_factory=tuple_row)
            while True:
                if place is not None:
                    cursor.execute(CORRECT_DATE, [new_date, transaction_id, place], prepare=False)
                    row = cursor.fetchone()
                    if row is not None:
                        return row
                cursor.execute(PLACE, [transaction_id])
                standing = cursor.fetchone()
                # It stays where it could not be changed, twice: policies hide it from updates. Otherwise it stands on
                # another day than its id carries, or somebody else is moving it.
                if standing is None or standing[0] == place == before:
                    raise TransactionNotFoundError
                before, place = place, standing[0]

        # Tuples, because they can be kept for an idempotency key.
        row = self._execute_write(
            operation, name="transactions.correct_date", idempotency_key=idempotency_key, timeout=timeout
        )
        return TransactionRow(*row)
