"""What writers notice while a big transactions table is partitioned, beside what migration 0004 does to them.

Four threads insert, correct amounts and dates, and delete, one row a transaction, while the table is attached, split,
copied and taken back. Every row is compared with what its writer was told. The peer is migration 0004 itself: the same
table, rewritten in one transaction.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import random
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg

from equitie_data import conversion, migrate
from equitie_data.embedded import EmbeddedServer
from equitie_data.testing import fresh_database
from measuring import print_aim, save

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

_DEALS, _INVESTORS, _YEARS = 500, 5000, 7
_THREADS = 4
_PAUSE = 0.002  # seconds between two writes of a thread: a machine of two processors has others to serve as well

Row = tuple[dt.date, int]


class Writers:
    """Threads that write, time each write, and remember what was committed.

    Args:
        dsn: The database, as its owner.
        rows: How many rows there are; each thread changes only those it has made itself.
    """

    def __init__(self, dsn: str, rows: int) -> None:
        self._dsn = dsn
        self._rows = rows
        self._stop = threading.Event()
        self.waits: list[tuple[float, float]] = []
        self.made: dict[int, Row] = {}
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(_THREADS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.5)
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _write(self, number: int) -> None:
        rng = random.Random(number)
        mine: dict[int, Row] = {}
        today = dt.date.today()  # noqa: DTZ011
        with psycopg.connect(self._dsn, autocommit=True) as conn:
            while not self._stop.is_set():
                kind = rng.choice(("insert", "insert", "amount", "date", "delete")) if mine else "insert"
                identity = rng.choice(list(mine)) if mine else 0
                date = today - dt.timedelta(days=rng.randrange(_YEARS * 365))
                amount = rng.randrange(10**6)
                began = time.perf_counter()
                try:
                    if kind == "insert":
                        row = conn.execute(
                            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
                            " VALUES (%s, %s, %s, %s) RETURNING transaction_id",
                            (rng.randrange(_DEALS) + 1, rng.randrange(_INVESTORS) + 1, date, amount),
                        ).fetchone()
                        assert row is not None
                        mine[row[0]] = (date, amount)
                        reached = 1
                    elif kind == "delete":
                        old = mine.pop(identity)
                        reached = conn.execute(
                            "DELETE FROM transactions_clean WHERE transaction_id = %s AND transaction_date = %s",
                            (identity, old[0]),
                        ).rowcount
                    else:
                        old = mine[identity]
                        mine[identity] = (old[0], amount) if kind == "amount" else (date, old[1])
                        reached = conn.execute(
                            "UPDATE transactions_clean SET transaction_date = %s, amount = %s"
                            " WHERE transaction_id = %s AND transaction_date = %s",
                            (*mine[identity], identity, old[0]),
                        ).rowcount
                except psycopg.Error as error:
                    self.problems.append(str(error))
                    return
                if reached != 1:
                    self.problems.append(f"{kind} reached {reached} rows")
                self.waits.append((began, time.perf_counter() - began))
                time.sleep(_PAUSE)
        self.made |= mine

    def check(self) -> None:
        """Fail unless the rows of before are untouched and exactly what was committed has been added."""
        assert not self.problems, self.problems[:3]
        with psycopg.connect(self._dsn) as conn:
            found = conn.execute(
                "SELECT transaction_id, transaction_date, amount::integer FROM transactions_clean WHERE units IS NULL"
            ).fetchall()
            assert len(found) == len(self.made)
            assert {row[0]: (row[1], row[2]) for row in found} == self.made
            old = conn.execute("SELECT count(*), sum(amount) FROM transactions_clean WHERE units = 1").fetchone()
            assert old == (self._rows, self._rows * (self._rows + 1) // 2), old
            conn.execute("DELETE FROM transactions_clean WHERE units IS NULL")


def fill(dsn: str, rows: int) -> None:
    """Migrate up to 0003 and load rows over seven years."""
    migrate.migrate(dsn, to=3)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(f"INSERT INTO deals_clean (deal_name) SELECT 'd' || g FROM generate_series(1, {_DEALS}) AS g")
        conn.execute(
            f"INSERT INTO investors_clean (full_name) SELECT 'i' || g FROM generate_series(1, {_INVESTORS}) AS g"
        )
        conn.execute(
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount, units)"
            f" SELECT 1 + g %% {_DEALS}, 1 + g %% {_INVESTORS}, "
            f" current_date - (g * 7919::bigint %% {_YEARS * 365})::int, g, 1 FROM generate_series(1, %s) AS g",
            (rows,),
        )
        conn.execute("VACUUM ANALYZE transactions_clean")


def measure(dsn: str, rows: int, operation: Callable[..., Any]) -> dict[str, Any]:
    """Run one operation under writers, and say what they noticed."""
    steps: list[tuple[str, float]] = []

    def advanced(step: str, count: int) -> None:
        if not count:
            steps.append((step, time.perf_counter()))

    with Writers(dsn, rows) as writers:
        began = time.perf_counter()
        report = operation(dsn, advanced)
        ended = time.perf_counter()
    writers.check()
    before = [wait for at, wait in writers.waits if at < began]
    during = sorted(wait for at, wait in writers.waits if began <= at <= ended)
    worst_at, worst = max((each for each in writers.waits if began - 0.1 <= each[0] <= ended), key=lambda each: each[1])
    step = next((name for name, at in reversed(steps) if at <= worst_at + worst), "before")
    bounds = [*steps, ("end", ended)]
    return {
        "seconds": ended - began,
        "exchange_ms": None if report is None else (report.exchange_seconds or 0) * 1000,
        "writes": len(during),
        "median_before_ms": statistics.median(before) * 1000,
        "median_ms": statistics.median(during) * 1000,
        "p99_ms": during[int(len(during) * 0.99)] * 1000,
        "longest_ms": worst * 1000,
        "longest_in": step,
        "steps": {name: after - at for (name, at), (_, after) in itertools.pairwise(bounds)},
    }


def rewrite(dsn: str, _: object) -> None:
    """Let the migration do it."""
    migrate.migrate(dsn, to=4, lock_timeout=60)


def main() -> None:
    """Measure every operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    rows = arguments.rows
    figures: dict[str, Any] = {"rows": rows}
    settings = {"fsync": "off", "shared_buffers": "512MB", "max_wal_size": "4GB"}
    with EmbeddedServer(settings=settings) as server, fresh_database(server) as flat:
        dsn = server.dsn(flat)
        fill(dsn, rows)
        with fresh_database(server, flat) as copy:
            figures["migration 0004"] = measure(server.dsn(copy), rows, rewrite)
        for name, operation in (
            ("attach", lambda dsn, advanced: conversion.convert(dsn, advanced=advanced)),
            ("take back", lambda dsn, advanced: conversion.undo(dsn, advanced=advanced)),
            ("attach again", lambda dsn, advanced: conversion.convert(dsn, advanced=advanced)),
            ("split", lambda dsn, advanced: conversion.split(dsn, advanced=advanced)),
            ("undo by copy", lambda dsn, advanced: conversion.undo(dsn, advanced=advanced)),
            ("copy", lambda dsn, advanced: conversion.convert(dsn, copy=True, advanced=advanced)),
        ):
            figures[name] = measure(dsn, rows, operation)
        began = time.perf_counter()
        migrate.migrate(dsn, to=9)
        figures["migrations 0005 to 0009, seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        migrate.migrate(dsn, to=10)
        figures["migration 0010, seconds"] = time.perf_counter() - began

    print(f"{rows:,} rows, {_THREADS} writers\n")
    print(f"  {'':<16}{'seconds':>9}{'writes':>9}{'median ms':>11}{'p99 ms':>9}{'longest ms':>12}  in")
    for name, each in figures.items():
        if isinstance(each, dict):
            print(
                f"  {name:<16}{each['seconds']:>9.1f}{each['writes']:>9,}{each['median_ms']:>11.1f}"
                f"{each['p99_ms']:>9.1f}{each['longest_ms']:>12.0f}  {each['longest_in']}"
            )
    print(f"\n  migration 0010 on the converted table: {figures['migration 0010, seconds']:.1f} s, exclusively locked")
    stall = figures["migration 0004"]["longest_ms"]
    for name in ("attach", "take back", "split", "undo by copy", "copy"):
        print_aim(f"{name}: longest wait against that of migration 0004", figures[name]["longest_ms"] / stall, 0.1)
    save("convert_live_table", figures)


if __name__ == "__main__":
    main()
