"""Four writers go on writing while a database is maintained: how long does any of them have to wait?

Every run starts from the same database: seven years of months, three of them past retention, months ahead missing,
and 200,000 late rows of two months in the default partition. The writers insert, insert more late rows, and change and
delete some of those. Meanwhile

- nothing happens, for comparison;
- ``python -m equitie_data maintain`` does its work: months, drain, retirement, archives, statistics, tasks;
- a script does the same month work the usual way: detach, create, move, attach, each in one transaction under the
  lock it needs, waiting for it as long as it takes.

Afterwards every row has to be there, with the amount it was given. Run it:
``python benchmarks/maintenance_stall.py [--rounds N] [--late N]``.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import sql

from equitie_data.embedded import EmbeddedServer
from equitie_data.migrate import migrate
from measuring import print_aim, save

if TYPE_CHECKING:
    from collections.abc import Callable

WRITERS = 4
QUIET_SECONDS = 8.0
AIM_MS = 100.0
NOTHING = "no maintenance"
OURS = "maintain"
SCRIPT = "a script, step by step"
LATE = ("2021-03", "2021-04")


class Run(NamedTuple):
    """What the writers went through.

    Attributes:
        seconds: How long it took.
        writes: How many transactions were committed.
        errors: How many failed.
        longest_ms: The longest one.
        p99_ms: The 99th percentile.
    """

    seconds: float
    writes: int
    errors: int
    longest_ms: float
    p99_ms: float


def prepare(dsn: str, late: int) -> None:
    """Fill the template database."""
    migrate(dsn)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("INSERT INTO investors_clean (full_name) SELECT 'i' || g FROM generate_series(1, 1000) AS g")
        conn.execute("INSERT INTO deals_clean (deal_name) SELECT 'd' || g FROM generate_series(1, 100) AS g")
        # The months from three before the cutoff on, without those of the late rows.
        conn.execute(
            "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', m::date, m::date)"
            " FROM generate_series(date_trunc('month', current_date - interval '7 years') - interval '3 months',"
            "  current_date, interval '1 month') AS m WHERE to_char(m, 'YYYY-MM') <> ALL (%s)",
            [list(LATE)],
        )
        conn.execute("DROP TABLE equitie_part.transactions_clean_" + f"{_next_year():%Y_%m}")
        conn.execute(
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT 1 + g %% 100, 1 + g %% 1000, date '2021-03-01' + g %% 60, 1 FROM generate_series(1, %s) AS g",
            [late],
        )
        conn.execute(
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT 1 + g % 100, 1 + g % 1000,"
            " (date_trunc('month', current_date - interval '7 years') - interval '80 days')::date + g % 1200, 1"
            " FROM generate_series(1, 100000) AS g"
        )
        conn.execute("ANALYZE transactions_clean")


def _next_year() -> Any:
    import datetime as dt  # noqa: PLC0415 - for this line

    today = dt.datetime.now(dt.timezone.utc)
    return today.replace(year=today.year + 1, day=1)


def write(dsn: str, seed: int, stop: threading.Event, figures: dict[str, Any]) -> None:
    """Write until told to stop; note how long each transaction took."""
    rng = random.Random(seed)
    durations: list[float] = []
    balance = errors = 0
    mine: list[tuple[int, Any]] = []
    insert = (
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " VALUES (%s, %s, %s, 1) RETURNING transaction_id, transaction_date"
    )
    with psycopg.connect(dsn, autocommit=True) as conn:
        while not stop.is_set():
            kind = rng.random()
            deal, investor = rng.randint(1, 100), rng.randint(1, 1000)
            late_day = f"2021-0{rng.randint(3, 4)}-{rng.randint(1, 28):02d}"
            started = time.perf_counter()
            try:
                if kind < 0.6 or not mine:
                    conn.execute(insert, [deal, investor, f"2024-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"])
                    balance += 1
                elif kind < 0.8:
                    row = conn.execute(insert, [deal, investor, late_day]).fetchone()
                    assert row is not None
                    mine.append((row[0], row[1]))
                    balance += 1
                elif kind < 0.95:
                    key = rng.choice(mine)
                    changed = conn.execute(
                        "UPDATE transactions_clean SET units = coalesce(units, 0) + 1"
                        " WHERE transaction_id = %s AND transaction_date = %s",
                        key,
                    )
                    assert changed.rowcount == 1, f"the row {key} was not seen by an UPDATE"
                else:
                    key = mine.pop(rng.randrange(len(mine)))
                    gone = conn.execute(
                        "DELETE FROM transactions_clean WHERE transaction_id = %s AND transaction_date = %s", key
                    )
                    assert gone.rowcount == 1, f"the row {key} was not seen by a DELETE"
                    balance -= 1
                if not mine:
                    row = conn.execute(insert, [deal, investor, late_day]).fetchone()
                    assert row is not None
                    mine.append((row[0], row[1]))
                    balance += 1
            except psycopg.Error as error:
                errors += 1
                figures.setdefault("messages", []).append(str(error).splitlines()[0])
            durations.append(time.perf_counter() - started)
    figures[f"writer {seed}"] = (durations, balance, errors)


def measure(dsn: str, work: Callable[[], None]) -> Run:
    """Let the writers write while something is done."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        (before,) = conn.execute("SELECT sum(amount) FROM transactions_clean").fetchone() or (0,)
    stop = threading.Event()
    figures: dict[str, Any] = {}
    threads = [threading.Thread(target=write, args=(dsn, seed, stop, figures)) for seed in range(WRITERS)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    try:
        work()
        time.sleep(max(0.0, QUIET_SECONDS - (time.perf_counter() - started)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    seconds = time.perf_counter() - started
    results = [figures[f"writer {seed}"] for seed in range(WRITERS)]
    durations = sorted(duration for each in results for duration in each[0])
    errors = sum(each[2] for each in results)
    if errors:
        print("   ", sorted(set(figures["messages"])))
    with psycopg.connect(dsn, autocommit=True) as conn:
        (after,) = conn.execute("SELECT sum(amount) FROM transactions_clean").fetchone() or (0,)
        (retired,) = conn.execute(
            "SELECT coalesce(sum(amount), 0) FROM equitie_private.retired_partitions"
        ).fetchone() or (0,)
        if work.__name__ == "script":
            (retired,) = conn.execute("SELECT sum(amount) FROM detached").fetchone() or (0,)
    expected = before + sum(each[1] for each in results)
    assert after + retired == expected, f"{after} + {retired} is not {expected}: rows were lost or doubled"
    return Run(
        seconds=seconds,
        writes=len(durations) - errors,
        errors=errors,
        longest_ms=durations[-1] * 1000,
        p99_ms=durations[int(len(durations) * 0.99)] * 1000,
    )


def nothing(_dsn: str) -> Callable[[], None]:
    """Return what does nothing."""

    def nothing() -> None:
        """Nobody works but the writers."""

    return nothing


def ours(dsn: str) -> Callable[[], None]:
    """Return a run of the command."""

    def ours() -> None:
        with tempfile.TemporaryDirectory() as archives:
            done = subprocess.run(
                [sys.executable, "-m", "equitie_data", "maintain", "--dsn", dsn, "--archive-dir", archives],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        with psycopg.connect(dsn) as conn:
            assert conn.execute("SELECT count(*) FROM ONLY equitie_part.transactions_clean_default").fetchone() == (0,)
            assert conn.execute(
                "SELECT count(*) FROM equitie_private.retired_partitions WHERE state = 'archived'"
            ).fetchone() == (3,)

    return ours


def by_script(dsn: str) -> Callable[[], None]:
    """Return the same month work, done the usual way."""

    def script() -> None:
        with psycopg.connect(dsn, autocommit=True) as conn:
            expired = conn.execute(
                "SELECT partition::text FROM equitie_private.month_partition_bounds('public.transactions_clean')"
                " WHERE NOT is_default AND to_key <= current_date - interval '7 years'"
            ).fetchall()
            conn.execute("CREATE UNLOGGED TABLE detached (amount numeric)")
            for (name,) in expired:
                conn.execute(f"ALTER TABLE transactions_clean DETACH PARTITION {name}")
                conn.execute(f"INSERT INTO detached SELECT sum(amount) FROM {name}")
            for month in LATE:
                conn.execute(
                    "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', %s, %s)",
                    [f"{month}-01", f"{month}-01"],
                )
            conn.execute(
                "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', current_date,"
                " (current_date + interval '12 months')::date)"
            )
            conn.execute("ANALYZE transactions_clean")

    return script


def copy_of(server: EmbeddedServer, stack: contextlib.ExitStack, number: int) -> str:
    """Return a fresh copy of the prepared database."""
    name = sql.Identifier(f"run_{number}")
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE prepared").format(name))

    def drop() -> None:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))

    stack.callback(drop)
    return server.dsn(f"run_{number}")


def main() -> None:
    """Run all contestants in turn and print what the writers saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--late", type=int, default=200_000, help="rows in the default partition")
    arguments = parser.parse_args()
    contestants = {NOTHING: nothing, OURS: ours, SCRIPT: by_script}
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    with EmbeddedServer(settings={"shared_buffers": "256MB", "max_wal_size": "4GB"}) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute("CREATE DATABASE prepared")
        prepare(server.dsn("prepared"), arguments.late)
        number = 0
        for turn in range(arguments.rounds):
            names = list(contestants)
            for name in names[turn % 3 :] + names[: turn % 3]:
                number += 1
                with contextlib.ExitStack() as stack:
                    dsn = copy_of(server, stack, number)
                    run = measure(dsn, contestants[name](dsn))
                runs[name].append(run)
                print(
                    f"  {name:<24}{run.seconds:6.1f} s{run.writes / run.seconds:9.0f} writes/s"
                    f"  p99 {run.p99_ms:7.1f} ms  longest {run.longest_ms:8.1f} ms  {run.errors} failed",
                    flush=True,
                )
    print(f"\n{'':<26}{'writes/s':>9}{'ratio':>7}{'p99 ms':>9}{'longest ms':>12}{'failed':>8}")
    rate = {name: statistics.median(run.writes / run.seconds for run in each) for name, each in runs.items()}
    for name, each in runs.items():
        p99 = statistics.median(run.p99_ms for run in each)
        longest = statistics.median(run.longest_ms for run in each)
        failed = sum(run.errors for run in each)
        ratio = rate[name] / rate[NOTHING]
        print(f"  {name:<24}{rate[name]:>9.0f}{ratio:>7.2f}{p99:>9.1f}{longest:>12.1f}{failed:>8}")
    print()
    beyond = statistics.median(
        ours.longest_ms - quiet.longest_ms for ours, quiet in zip(runs[OURS], runs[NOTHING], strict=True)
    )
    print_aim("longest wait beyond that of a run without maintenance, of 100 ms", beyond / AIM_MS, 1.0)
    print_aim("failed writes", float(sum(run.errors for run in runs[OURS])), 0.0)
    save("maintenance_stall", {name: [run._asdict() for run in each] for name, each in runs.items()})


if __name__ == "__main__":
    main()
