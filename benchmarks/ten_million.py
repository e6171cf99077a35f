"""Ten million transactions: how fast they load, what they weigh, what the platform's queries take, the month report.

Four parts, all on one server:

- *load rate*: `load_transactions` against COPY of the same kind of lines into the same tables, with one stream and
  with two, into a small table and into the full one, with the audit trail (as in production) and without;
- *sizes*, against the same rows in one flat table with the same indexes and foreign keys;
- *queries* of the platform, p50 and p99 over many parameters, warm: the flat table and the partitioned one read by
  the owner through psycopg, and the partitioned one through the library under row-level security;
- the *month report* by the rollup against the full aggregate.

Run it: ``python benchmarks/ten_million.py [--rows N]``. Ten million rows take about a quarter of an hour, and 12 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import itertools
import random
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import attrs
import psycopg

import plots
from equitie_data import Database, Settings, as_service
from equitie_data.bulk import load_transactions
from equitie_data.embedded import EmbeddedServer
from equitie_data.provision import provision
from measuring import save
from platform_queries import PATTERNS, drawn_parameters, percentiles, timings
from transactions_sample import COLUMNS, PARENTS, first_day, last_day, lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Connection = psycopg.Connection[Any]

SERVER = {
    "shared_buffers": "3GB",
    "effective_cache_size": "10GB",
    "maintenance_work_mem": "512MB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "30min",
    "random_page_cost": "1.1",
    "jit": "off",
    "max_locks_per_transaction": "256",
}
COPY = f"COPY public.transactions_clean ({', '.join(COLUMNS)}) FROM STDIN"
BLOCK = 1 << 17  # bytes handed to libpq at a time
RAW = "COPY, 2 streams"
BULK = "load_transactions, 2 streams"
FLAT = """
CREATE TABLE public.transactions_flat (LIKE public.transactions_clean INCLUDING DEFAULTS INCLUDING CONSTRAINTS);
INSERT INTO public.transactions_flat SELECT * FROM public.transactions_clean;
ALTER TABLE public.transactions_flat ADD PRIMARY KEY (transaction_id);
DO $$
DECLARE
  definition text;
BEGIN
  FOR definition IN
    SELECT replace(
      pg_get_indexdef(i.indexrelid), c.relname || ' ON ONLY public.transactions_clean', 'ON public.transactions_flat'
    )
    FROM pg_index AS i
    INNER JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE i.indrelid = 'public.transactions_clean'::regclass AND NOT i.indisprimary
  LOOP
    EXECUTE definition;
  END LOOP;
END
$$;
ALTER TABLE public.transactions_flat ADD FOREIGN KEY (deal_id) REFERENCES public.deals_clean (deal_id);
ALTER TABLE public.transactions_flat ADD FOREIGN KEY (investor_id) REFERENCES public.investors_clean (investor_id);
"""
SIZES = """
SELECT sum(pg_table_size(t.relid))::bigint, sum(pg_indexes_size(t.relid))::bigint
FROM (
  SELECT p.relid FROM pg_partition_tree(%(table)s::regclass) AS p
  UNION
  SELECT %(table)s::regclass
) AS t
"""
AGGREGATE = (
    "SELECT date_trunc('month', transaction_date)::date, transaction_type, status, currency, count(*), sum(amount),"
    " sum(gross_capital), sum(net_capital), sum(admin_fee) FROM {} WHERE transaction_date BETWEEN %s AND %s"
    " GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"
)
REPORT = "SELECT * FROM public.month_report(%s, %s)"
REFRESH = "SELECT equitie_private.refresh_transaction_months()"


@contextlib.contextmanager
def timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say how long the block took, and keep it."""
    started = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - started
    print(f"  {what}: {seconds[what]:,.2f} s", flush=True)


def switch_triggers(owner: Connection, kind: str, *, on: bool) -> None:
    """Switch the audit trail's or the rollup's triggers of the partitioned table on or off."""
    for event in ("insert", "update", "delete"):
        action = "ENABLE ALWAYS" if on else "DISABLE"
        owner.execute(f"ALTER TABLE ONLY public.transactions_clean {action} TRIGGER {kind}_{event}")


# --- load rate ----------------------------------------------------------------------------------------------------


def copy(dsn: str, rows: list[bytes]) -> None:
    """Copy lines in one transaction of the owner, as plainly as it goes."""
    block = b"".join(rows)
    with psycopg.connect(dsn, autocommit=True) as owner, owner.cursor() as cursor, cursor.copy(COPY) as stream:
        for begin in range(0, len(block), BLOCK):
            stream.write(block[begin : begin + BLOCK])


def copy_halves(dsn: str, rows: list[bytes]) -> None:
    """Copy one half of the lines on each of two connections."""
    half = len(rows) // 2
    threads = [threading.Thread(target=copy, args=(dsn, part)) for part in (rows[:half], rows[half:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def by_date(rows: list[bytes]) -> list[bytes]:
    """Sort lines by date, so that each half of them is in order as well."""
    ordered = sorted(rows, key=lambda line: line.split(b"\t", 3)[2])
    return ordered[::2] + ordered[1::2]


def load_rates(dsn: str, database: Database, rows: int, rounds: int) -> dict[str, list[float]]:
    """Return rows a second of every round, by contestant; every load has rows of its own."""
    seeds = itertools.count(random.randrange(1 << 40))

    def bulk(part: list[bytes], streams: int) -> None:
        load_transactions(database, part, key=f"rate {uuid4()}", columns=COLUMNS, streams=streams)

    loads: dict[str, tuple[Callable[[list[bytes]], list[bytes]], Callable[[list[bytes]], None]]] = {
        "COPY, 1 stream": (list, lambda part: copy(dsn, part)),
        "load_transactions, 1 stream": (list, lambda part: bulk(part, 1)),
        RAW: (list, lambda part: copy_halves(dsn, part)),
        "COPY, 2 streams, sorted before": (by_date, lambda part: copy_halves(dsn, part)),
        BULK: (list, lambda part: bulk(part, 2)),
    }
    rates: dict[str, list[float]] = {name: [] for name in loads}
    for number in range(rounds):
        names = list(loads)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            prepare, load = loads[name]
            part = prepare(list(lines(rows, next(seeds))))
            started = time.perf_counter()
            load(part)
            rates[name].append(rows / (time.perf_counter() - started))
    return rates


def print_rates(title: str, rates: dict[str, list[float]]) -> float:
    """Print the rates; return the median over rounds of ours against raw COPY, with two streams each."""
    print(f"\n{title}, rows/s")
    for name, values in rates.items():
        print(f"  {name:<34}{statistics.median(values):>10,.0f}  (from {min(values):,.0f} to {max(values):,.0f})")
    ratio = statistics.median(ours / raw for ours, raw in zip(rates[BULK], rates[RAW], strict=True))
    print(f"  {judged(ratio >= 0.9)}  ours against COPY, 2 streams: {ratio:.2f} (aim >= 0.90)", flush=True)
    return ratio


def judged(met: bool) -> str:
    """Return the word for an aim."""
    return "met " if met else "LOST"


def trigger_cost(owner: Connection, dsn: str, rows: int, rounds: int) -> float:
    """Return what the rollup's triggers add to COPY, as a ratio of times."""
    seeds = itertools.count(random.randrange(1 << 40))
    ratios = []
    for number in range(rounds):
        seconds = {}
        for on in (True, False) if number % 2 else (False, True):
            switch_triggers(owner, "month", on=on)
            part = list(lines(rows, next(seeds)))
            started = time.perf_counter()
            copy(dsn, part)
            seconds[on] = time.perf_counter() - started
        ratios.append(seconds[True] / seconds[False])
    switch_triggers(owner, "month", on=True)
    # What was written meanwhile without a note is noted here.
    owner.execute(
        "INSERT INTO equitie_private.transaction_month_changes (month)"
        " SELECT m.month FROM equitie_private.transaction_months AS m"
    )
    return statistics.median(ratios)


# --- sizes --------------------------------------------------------------------------------------------------------


def sizes_of(owner: Connection) -> dict[str, dict[str, int]]:
    """Return rows and bytes of the tables and of their indexes, and print them."""
    sizes = {}
    for name in ("transactions_clean", "transactions_flat", "audit_logs"):
        (rows,) = owner.execute(f"SELECT count(*) FROM public.{name}").fetchone() or (0,)
        table, indexes = owner.execute(SIZES, {"table": f"public.{name}"}).fetchone() or (0, 0)
        sizes[name] = {"rows": rows, "table": table, "indexes": indexes}
        print(f"  {name:<20}{rows:>12,} rows, table {table / 1e6:>7,.0f} MB, indexes {indexes / 1e6:>7,.0f} MB")
    return sizes


# --- the month report ---------------------------------------------------------------------------------------------


def report_times(owner: Connection, database: Database, rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of the report and of the aggregates it stands for, by contestant."""
    ever, year = (first_day(), last_day()), (last_day() - dt.timedelta(days=365), last_day())

    def aggregate(table: str, span: tuple[Any, Any]) -> Callable[[], Any]:
        # Not prepared: a plan for any range of dates would go through the index, which is several times as slow.
        return lambda: owner.execute(AGGREGATE.format(table), span, prepare=False).fetchall()

    readers: dict[str, Callable[[], Any]] = {
        "month_report, 7 years": lambda: database.execute_read(REPORT, ever),
        "month_report, 1 year": lambda: database.execute_read(REPORT, year),
        "aggregate, 7 years, partitioned": aggregate("public.transactions_clean", ever),
        "aggregate, 7 years, flat": aggregate("public.transactions_flat", ever),
        "aggregate, 1 year, partitioned": aggregate("public.transactions_clean", year),
    }
    figures: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, read in readers.items():
            started = time.perf_counter()
            read()
            if number:  # the first round warms up
                figures[name].append((time.perf_counter() - started) * 1e3)
    return figures


def month_reports(owner: Connection, database: Database, rounds: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Measure the report with every month kept, with one to count, and with all of them to count."""
    with timed("first refresh of the rollup", seconds):
        owner.execute(REFRESH)
    figures = {"every month kept": report_times(owner, database, rounds)}
    owner.execute(
        "INSERT INTO public.transactions_clean (investor_id, deal_id, transaction_date, amount) VALUES (1, 1, %s, 1)",
        [last_day() - dt.timedelta(days=40)],
    )
    figures["one month written to since"] = report_times(owner, database, rounds)
    with timed("refresh of one month", seconds):
        owner.execute(REFRESH)
    owner.execute(
        "INSERT INTO equitie_private.transaction_month_changes (month)"
        " SELECT m.month FROM equitie_private.transaction_months AS m"
    )
    figures["every month written to since"] = report_times(owner, database, 1)
    with timed("refresh of every month", seconds):
        owner.execute(REFRESH)

    for state, times in figures.items():
        print(f"\nmonth report, {state}, ms")
        for name, values in times.items():
            print(f"  {name:<34}{statistics.median(values):>10,.1f}")
        ratio = statistics.median(times["aggregate, 7 years, flat"]) / statistics.median(times["month_report, 7 years"])
        aim = "" if state == "every month written to since" else f"  {judged(ratio >= 3)} (aim >= 3)"
        print(f"  the report is {ratio:.1f} times as fast as the full aggregate over the flat table{aim}", flush=True)
    return figures


# --- all of it ----------------------------------------------------------------------------------------------------


def print_queries(figures: Mapping[str, Mapping[str, Sequence[tuple[float, float | None]]]]) -> None:
    """Print p50 and p99 by pattern and contestant, on the clock and on the processor."""
    print(f"\n{'queries, warm, ms':<36}{'':<20}{'clock p50':>10}{'p99':>8}{'processor p50':>15}{'p99':>8}")
    for pattern, contests in figures.items():
        for name, calls in contests.items():
            clock = percentiles([passed for passed, _ in calls])
            used = percentiles([passed if spent is None else spent for passed, spent in calls])
            verdict = "" if used[1] < 10 or name.startswith("flat") else "  LOST (aim < 10)"
            print(f"{pattern:<36}{name:<20}{clock[0]:>10.2f}{clock[1]:>8.2f}{used[0]:>15.2f}{used[1]:>8.2f}{verdict}")


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--sample", type=int, default=80_000, help="rows of one timed load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=300, help="parameters drawn for each query")
    arguments = parser.parse_args()
    seconds: dict[str, float] = {}
    results: dict[str, Any] = {"rows": arguments.rows, "sample": arguments.sample, "load_rates": {}, "ratios": {}}

    with EmbeddedServer(settings=SERVER) as server, contextlib.ExitStack() as stack:
        app_dsn = provision(server)
        dsn = server.dsn("equitie")
        owner = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        owner.execute(PARENTS)
        settings = Settings(dsn=app_dsn, enable_performance_monitoring=False, statement_timeout=600, call_timeout=600)
        database = stack.enter_context(Database(settings))
        stack.enter_context(as_service("benchmark"))

        def measure_loads(place: str) -> None:
            for audited in (True, False):
                switch_triggers(owner, "audit", on=audited)
                title = f"{place}, {'audited' if audited else 'not audited'}"
                rates = load_rates(dsn, database, arguments.sample, arguments.rounds)
                results["load_rates"][title] = rates
                results["ratios"][title] = print_rates(title, rates)

        load_transactions(database, lines(50_000, 0), key="first", columns=COLUMNS)
        measure_loads("into a small table")

        # Room for what the loads into the full table bring.
        (standing,) = owner.execute("SELECT count(*) FROM public.transactions_clean").fetchone() or (0,)
        missing = max(arguments.rows - 2 * standing, 50_000)
        print(f"\nloading {missing:,} more rows, not audited")
        report = load_transactions(database, lines(missing, 1), key="all", columns=COLUMNS)
        results["load"] = {"rows": report.loaded, "seconds": report.seconds, "batches": report.batches}
        print(f"  {report.seconds:,.0f} s, {report.loaded / report.seconds:,.0f} rows/s", flush=True)
        measure_loads("into the full table")
        ratio = trigger_cost(owner, dsn, arguments.sample, arguments.rounds + 2)
        results["ratios"]["COPY with the rollup's triggers"] = ratio
        print(f"\n  {judged(ratio < 1.05)}  COPY with the rollup's triggers: {ratio:.3f} (aim < 1.05)")
        switch_triggers(owner, "audit", on=True)

        with timed("the same rows in a flat table", seconds):
            owner.execute(FLAT)
        with timed("VACUUM ANALYZE of both", seconds):
            owner.execute("VACUUM ANALYZE public.transactions_clean")
            owner.execute("VACUUM ANALYZE public.transactions_flat")
        results["sizes"] = sizes_of(owner)
        results["month_reports"] = month_reports(owner, database, arguments.rounds, seconds)
        one = stack.enter_context(Database(attrs.evolve(settings, min_size=1, max_size=1)))
        results["queries"] = {
            pattern.name: timings(owner, dsn, one, pattern, drawn_parameters(owner, pattern, arguments.queries))
            for pattern in PATTERNS
        }
        print_queries(results["queries"])

    results["seconds"] = seconds
    save("ten_million", results)
    plots.bars(
        "ten_million_load",
        "loading into the full table: indexes, foreign keys, audit trail",
        "rows/s",
        results["load_rates"]["into the full table, audited"],
    )


if __name__ == "__main__":
    main()
