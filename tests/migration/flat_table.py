"""A flat transactions table as the platform has it, and writers that know to the last row what must be in it."""

from __future__ import annotations

import contextlib
import datetime as dt
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs
import psycopg

from equitie_data import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

TODAY = dt.date.today()  # noqa: DTZ011 - the conversion's months are the server's
DEALS, INVESTORS = 5, 7
SETTLED = 1
"""The one row with the status completed. Nobody writes it, so everybody must see it at any moment."""


def make_flat(dsn: str, rows: int, *, days: int = 90) -> None:
    """Migrate up to 0003 and write rows of the last ``days`` days, ids counted from 1."""
    migrate.migrate(dsn, to=3)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(
            f"INSERT INTO public.deals_clean (deal_name) SELECT 'd' || g FROM generate_series(1, {DEALS}) AS g"
        )
        conn.execute(
            f"INSERT INTO public.investors_clean (full_name) SELECT 'i' || g FROM generate_series(1, {INVESTORS}) AS g"
        )
        conn.execute(
            "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount, units)"
            f" SELECT 1 + g %% {DEALS}, 1 + g %% {INVESTORS}, %s::date - (g * 7919 %% {days}), g, g * 0.1"
            " FROM generate_series(1, %s) AS g",
            (TODAY, rows),
        )
        conn.execute(
            "UPDATE public.transactions_clean SET status = 'completed', transaction_date = %s"
            " WHERE transaction_id = %s",
            (TODAY - dt.timedelta(days=100), SETTLED),
        )
        conn.execute("ANALYZE public.transactions_clean")


def contents(dsn: str) -> list[tuple[Any, ...]]:
    """Return every row with every value."""
    with psycopg.connect(dsn) as conn:
        return conn.execute(
            "SELECT transaction_id, transaction_date::text, amount, t::text FROM public.transactions_clean AS t"
            " ORDER BY 1, 2"
        ).fetchall()


@attrs.define
class Ledger:
    """Threads that write, and what they have been told is committed.

    Attributes:
        dsn: The database, as its owner.
        isolation: Isolation level of the writers.
        rows: What must be there: date and amount by id.
        errors: What went wrong, and must not have.
        longest: Seconds the slowest write took.
        writes: How many were committed.
        retried: How many were refused by the isolation level, and so did not happen.
    """

    dsn: str
    isolation: str = "read committed"
    rows: dict[int, tuple[dt.date, int]] = attrs.field(factory=dict)
    errors: list[str] = attrs.field(factory=list)
    longest: float = 0.0
    writes: int = 0
    retried: int = 0
    latest_date: dt.date = TODAY
    pause: float = 0.004
    _stop: threading.Event = attrs.field(factory=threading.Event)

    @contextlib.contextmanager
    def writing(self, threads: int = 4) -> Iterator[None]:
        """Write for the length of a `with` block."""
        with psycopg.connect(self.dsn) as conn:
            found = conn.execute(
                "SELECT transaction_id, transaction_date, amount::integer FROM public.transactions_clean"
            ).fetchall()
        self._stop.clear()
        owned: list[dict[int, tuple[dt.date, int]]] = [{} for _ in range(threads)]
        settled = {identity: (date, amount) for identity, date, amount in found if identity == SETTLED}
        for identity, date, amount in found:
            if identity == SETTLED:
                continue
            owned[identity % threads][identity] = (date, amount)
        workers = [threading.Thread(target=self._write, args=(n, owned[n])) for n in range(threads)]
        workers.append(threading.Thread(target=self._read))
        for worker in workers:
            worker.start()
        try:
            yield
            time.sleep(0.1)
        finally:
            self._stop.set()
            for worker in workers:
                worker.join()
        self.rows = {identity: row for part in (settled, *owned) for identity, row in part.items()}

    def _date(self, rng: random.Random) -> dt.date:
        back = rng.choice((5, 40, 120))
        return self.latest_date - dt.timedelta(days=rng.randrange(back))

    def _write(self, number: int, mine: dict[int, tuple[dt.date, int]]) -> None:
        rng = random.Random(number)
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            conn.execute(f"SET default_transaction_isolation = '{self.isolation}'")
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    self._write_once(conn, rng, mine)
                    self.writes += 1
                except psycopg.errors.SerializationFailure:
                    self.retried += 1
                    if self.isolation == "read committed":
                        self.errors.append("a READ COMMITTED write was refused by the isolation level")
                except Exception as error:  # noqa: BLE001 - whatever it is, the test is to tell
                    self.errors.append(f"{type(error).__name__}: {error}")
                    return
                self.longest = max(self.longest, time.monotonic() - began)
                time.sleep(self.pause)

    def _write_once(
        self, conn: psycopg.Connection[Any], rng: random.Random, mine: dict[int, tuple[dt.date, int]]
    ) -> None:
        date, amount = self._date(rng), rng.randrange(1, 10**6)
        kind = rng.choice(("insert", "insert", "amount", "date", "date", "delete"))
        identity = rng.choice(list(mine)) if mine else 0
        with conn.transaction():
            # A snapshot that is older than the lock on the table, in the stricter levels.
            conn.execute("SELECT 1 FROM public.deals_clean LIMIT 1")
            if kind == "insert":
                row = conn.execute(
                    "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount)"
                    " VALUES (%s, %s, %s, %s) RETURNING transaction_id",
                    (rng.randrange(DEALS) + 1, rng.randrange(INVESTORS) + 1, date, amount),
                ).fetchone()
                assert row
                identity, count = row[0], 1
            elif kind == "amount":
                date = mine[identity][0]
                count = conn.execute(
                    "UPDATE public.transactions_clean SET amount = %s WHERE transaction_id = %s", (amount, identity)
                ).rowcount
            elif kind == "date":
                amount = mine[identity][1]
                count = conn.execute(
                    "UPDATE public.transactions_clean SET transaction_date = %s WHERE transaction_id = %s",
                    (date, identity),
                ).rowcount
            else:
                count = conn.execute(
                    "DELETE FROM public.transactions_clean WHERE transaction_id = %s", (identity,)
                ).rowcount
        if count != 1:
            self.errors.append(f"{kind} of {identity} reached {count} rows")
        if kind == "delete":
            del mine[identity]
        else:
            mine[identity] = (date, amount)

    def _read(self) -> None:
        """Look for moments in which rows are invisible: in one statement, and with a snapshot from before."""
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            while not self._stop.is_set():
                try:
                    with conn.transaction():
                        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                        conn.execute("SELECT 1")
                        time.sleep(0.01)
                        row = conn.execute(
                            "SELECT count(*) FROM public.transactions_clean WHERE status = 'completed'"
                        ).fetchone()
                except Exception as error:  # noqa: BLE001 - the same
                    self.errors.append(f"a reader: {type(error).__name__}: {error}")
                    return
                if row != (1,):
                    self.errors.append(f"a reader saw {row} instead of the one settled row")

    def compare(self) -> None:
        """Fail unless exactly the rows that were committed are there."""
        assert self.errors == []
        with psycopg.connect(self.dsn) as conn:
            found = conn.execute(
                "SELECT transaction_id, transaction_date, amount::integer FROM public.transactions_clean"
            ).fetchall()
        assert len(found) == len({row[0] for row in found}), "a row is there twice"
        assert {row[0]: (row[1], row[2]) for row in found} == self.rows
