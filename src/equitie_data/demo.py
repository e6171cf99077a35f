"""``python -m equitie_data demo``: the main job to watch, on a server of its own, proving what it prints."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

import attrs

from equitie_data.cli import Progress, run_cli
from equitie_data.connect import connect
from equitie_data.context import acting_as, as_service
from equitie_data.csv_file import CsvFile
from equitie_data.csv_import import ImportReport, import_csv
from equitie_data.database import Database
from equitie_data.errors import EquitieDataError
from equitie_data.hooks import OperationEnded, Retried
from equitie_data.migrate import migrate
from equitie_data.sample import csv_stream
from equitie_data.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection
    from typing_extensions import LiteralString

__all__ = ["main", "run_demo"]

_INVESTORS: Final = 4
_READS_PER_INVESTOR: Final = 500
_ADMIN_WRITES: Final = 200
_INVESTOR_WRITES: Final = 50
# Headers the demo knows how to read without being told.
_KNOWN_COLUMNS: Final = {
    "company_name": "company",
    "investor_name": "investor",
    "funded_when": "date",
    "amount_usd": "amount",
}

_NEWEST = """
SELECT transaction_id, investor_id, transaction_date, amount
FROM transactions_clean
WHERE investor_id = %s
ORDER BY transaction_date DESC
LIMIT 50
"""
_CHANGES = "SELECT count(*) FROM public.audit_logs WHERE source = 'trigger'"


@attrs.define
class _Journal:
    """What happened, as the pool's hooks tell it."""

    seconds: dict[str, list[float]] = attrs.field(factory=lambda: {"read": [], "write": []})
    retries: int = 0
    lock: threading.Lock = attrs.field(factory=threading.Lock)

    def on_event(self, event: object) -> None:
        if isinstance(event, OperationEnded) and event.name is not None and event.name.startswith("demo "):
            with self.lock:
                self.seconds[event.kind].append(event.seconds)
        elif isinstance(event, Retried):
            with self.lock:
                self.retries += 1


@attrs.define
class _Investor:
    user_id: UUID
    investor_id: int
    name: str


@attrs.define
class _Outcome:
    """What the demo found; every pair in ``checks`` must be equal."""

    server: str
    load: ImportReport
    total: int
    workload_seconds: float = 0.0
    one_investor: str = ""
    seen: int = 0
    owned: int = 0
    retries: int = 0
    partitions: int = 0
    slow_queries: int = 0
    changes: int = 0
    audited: int = 0
    latencies: dict[str, dict[str, float]] = attrs.field(factory=dict)
    checks: list[tuple[str, bool]] = attrs.field(factory=list)

    @property
    def holds(self) -> bool:
        return all(passed for _, passed in self.checks)


def run_demo(
    database: Database, operator_dsn: str, source: Any, columns: dict[str, str], journal: _Journal
) -> _Outcome:
    """Import, read and write as several people, lose a connection on the way, and check everything.

    Args:
        database: An open, migrated, empty database.
        operator_dsn: A DSN that may end backends and sees everything, for the checks.
        source: The CSV file to import.
        columns: Its columns' fields.
        journal: A hook of the database.
    """
    with contextlib.closing(connect(operator_dsn)) as operator:
        audited_before = _one(operator, _CHANGES)
        size = Path(source).stat().st_size if isinstance(source, Path) else len(source.getvalue())
        with as_service("demo import"), Progress("importing", size, "bytes") as progress:
            load = import_csv(database, source, columns=columns, progress=progress)
        created = load.companies_created + load.investors_created + load.deals_created + load.inserted
        investors, admin = _make_users(database)
        operator.execute("ANALYZE")
        outcome = _Outcome(
            server=f"PostgreSQL {operator.info.server_version // 10_000}",
            load=load,
            total=_one(operator, "SELECT count(*) FROM public.transactions_clean"),
        )
        made = created + len(investors) + 1 + _work(database, operator_dsn, investors, admin, outcome)
        outcome.total = _one(operator, "SELECT count(*) FROM public.transactions_clean")
        _look_back(database, operator, investors, outcome)
        outcome.changes, outcome.audited = made, _one(operator, _CHANGES) - audited_before
        outcome.retries = journal.retries
        outcome.latencies = {kind: _quantiles(values) for kind, values in journal.seconds.items()}
        outcome.slow_queries = sum(database.monitor.get_dashboard_data()["queries"]["slow"].values())
        outcome.checks += [
            ("the import balances in rows and in money", _balances(load)),
            ("one investor saw exactly their own rows", outcome.seen == outcome.owned > 0),
            ("every change is in the audit log, once", outcome.audited == outcome.changes),
            ("the killed connection was retried", outcome.retries > 0),
        ]
        return outcome


def _make_users(database: Database) -> tuple[list[_Investor], UUID]:
    """Give logins to the busiest investors and to one admin."""

    def make(conn: Connection[Any]) -> tuple[list[_Investor], UUID]:
        rows = conn.execute(
            "SELECT t.investor_id, i.full_name FROM public.transactions_clean AS t "
            "INNER JOIN public.investors_clean AS i USING (investor_id) "
            "GROUP BY 1, 2 ORDER BY count(*) DESC, 1 LIMIT %s",
            [_INVESTORS],
        ).fetchall()
        investors = [_Investor(uuid4(), investor_id, name) for investor_id, name in rows]
        admin = uuid4()
        profiles = [(each.user_id, f"{each.user_id}@demo.example", "investor", each.investor_id) for each in investors]
        conn.cursor().executemany(
            "INSERT INTO public.user_profiles (user_id, email, role, investor_id) VALUES (%s, %s, %s, %s)",
            [*profiles, (admin, f"{admin}@demo.example", "admin", None)],
        )
        return investors, admin

    with as_service("demo users"):
        investors: list[_Investor]
        investors, admin = database.execute_write(make, name="make users")
        return investors, admin


def _work(database: Database, operator_dsn: str, investors: list[_Investor], admin: UUID, outcome: _Outcome) -> int:
    """Read and write as everybody at once; return how many rows were changed."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(investors) + 1) as threads:
        readers = [threads.submit(_invest, database, each, number) for number, each in enumerate(investors)]
        writer = threads.submit(_administer, database, operator_dsn, admin, investors)
        found = [reader.result() for reader in readers]
        admin_changes, killed_once = writer.result()
    outcome.workload_seconds = time.perf_counter() - started
    outcome.checks += [
        ("no read returned a row of somebody else", not any(leaks for leaks, _ in found)),
        ("the write whose connection was killed is there once", killed_once),
    ]
    return sum(changes for _, changes in found) + admin_changes


def _invest(database: Database, investor: _Investor, seed: int) -> tuple[int, int]:
    """Read as one investor, and now and then change their own phone number."""
    rng = random.Random(seed)  # noqa: S311 - a workload
    leaks = changes = 0
    with acting_as(investor.user_id, ip_address="203.0.113.9", user_agent="demo"):
        for turn in range(_READS_PER_INVESTOR):
            if turn % (_READS_PER_INVESTOR // _INVESTOR_WRITES) == 0:
                changes += database.execute_write(
                    "UPDATE public.investors_clean SET phone = %s WHERE investor_id = %s",
                    [f"+1 555 {rng.randrange(10**7):07d} {turn}", investor.investor_id],
                    name="demo change phone",
                )
            if turn % 10 == 1:
                held = database.execute_read(_portfolio, name="demo portfolio")
                leaks += held != [investor.investor_id]
            else:
                rows = database.execute_read(_NEWEST, [investor.investor_id], name="demo newest 50")
                leaks += any(row[1] != investor.investor_id for row in rows) or not rows
    return leaks, changes


def _portfolio(conn: Connection[Any]) -> list[int]:
    conn.execute("SELECT deal_id, sum(amount) FROM public.transactions_clean GROUP BY deal_id LIMIT 20").fetchall()
    return [row[0] for row in conn.execute("SELECT DISTINCT investor_id FROM public.transactions_clean")]


def _administer(database: Database, operator_dsn: str, admin: UUID, investors: list[_Investor]) -> tuple[int, bool]:
    """Record transactions as the admin; in the middle of one of them its backend is killed."""
    changes = 0
    attempts: list[int] = []

    def record(conn: Connection[Any], *, units: int, kill: bool) -> int:
        deal = conn.execute("SELECT min(deal_id) FROM public.deals_clean").fetchone()
        row = conn.execute(
            "INSERT INTO public.transactions_clean "
            "(deal_id, investor_id, transaction_date, transaction_type, status, units, amount, currency) "
            "VALUES (%s, %s, current_date - 1, 'primary', 'pending', %s, 1000, 'USD') RETURNING transaction_id",
            [deal[0] if deal else None, investors[units % len(investors)].investor_id, units],
        ).fetchone()
        if kill:
            attempts.append(conn.info.backend_pid)
            if len(attempts) == 1:
                with contextlib.closing(connect(operator_dsn)) as operator:
                    operator.execute("SELECT pg_terminate_backend(%s, 2000)", attempts)
            conn.execute("SELECT 1")  # the transaction goes on, and finds its connection gone
        assert row is not None  # noqa: S101 - RETURNING of one inserted row
        return int(row[0])

    killed_units = _ADMIN_WRITES // 2
    with acting_as(admin, request_id="demo"):
        for units in range(_ADMIN_WRITES):
            operation = functools.partial(record, units=units, kill=units == killed_units)
            made = database.execute_write(operation, name="demo record transaction")
            changes += 1
            if units % 2:
                changes += database.execute_write(
                    "UPDATE public.transactions_clean SET status = 'completed' "
                    "WHERE transaction_id = %s AND transaction_date = current_date - 1",
                    [made],
                    name="demo complete",
                )
        found = database.execute_read(
            "SELECT count(*) FROM public.transactions_clean WHERE units = %s AND transaction_date = current_date - 1",
            [killed_units],
            name="demo count",
        )
    return changes, len(attempts) == 2 and found[0][0] == 1


def _look_back(database: Database, operator: Connection[Any], investors: list[_Investor], outcome: _Outcome) -> None:
    """Compare what one investor sees with what is theirs."""
    one = investors[0]
    with acting_as(one.user_id):
        outcome.seen = database.execute_read("SELECT count(*) FROM public.transactions_clean")[0][0]
    outcome.one_investor = one.name
    outcome.owned = _one(
        operator, "SELECT count(*) FROM public.transactions_clean WHERE investor_id = %s", [one.investor_id]
    )
    outcome.partitions = _one(
        operator,
        "SELECT count(*) FROM pg_catalog.pg_inherits "
        "WHERE inhparent = 'public.transactions_clean'::pg_catalog.regclass",
    )


def _one(connection: Connection[Any], query: LiteralString, params: list[Any] | None = None) -> int:
    row = connection.execute(query, params).fetchone()
    assert row is not None  # noqa: S101 - an aggregate always returns a row
    return int(row[0])


def _balances(load: ImportReport) -> bool:
    return load.read == load.inserted + load.duplicates + load.rejected and (
        load.amount_read == load.amount_inserted + load.amount_duplicates + load.amount_rejected
    )


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1000

    return {"calls": len(seconds), "p50_ms": at(0.50), "p95_ms": at(0.95), "p99_ms": at(0.99)}


# --- what is shown ------------------------------------------------------------------------------------------------


def _as_json(outcome: _Outcome, seconds: float) -> str:
    load = outcome.load
    return json.dumps(
        {
            "server": outcome.server,
            "seconds": round(seconds, 2),
            "import": json.loads(load.to_json()),
            "rows_per_second": round(load.inserted / max(load.seconds, 1e-9)),
            **{kind: {k: round(v, 3) for k, v in figures.items()} for kind, figures in outcome.latencies.items()},
            "workload_seconds": round(outcome.workload_seconds, 2),
            "visibility": {"seen": outcome.seen, "owned": outcome.owned, "total": outcome.total},
            "retries": outcome.retries,
            "audit": {"changes": outcome.changes, "events": outcome.audited},
            "slow_queries": outcome.slow_queries,
            "partitions": outcome.partitions,
            "checks": dict(outcome.checks),
            "ok": outcome.holds,
        },
        indent=2,
    )


def _as_table(outcome: _Outcome, seconds: float) -> str:
    load = outcome.load
    lines = ["", f"  equitie_data demo on {outcome.server}, {seconds:.1f} s", "  " + "-" * 74]

    def show(label: str, value: str) -> None:
        lines.append(f"  {label:<16}{value}")

    show("import", f"{load.read:,} read = {load.inserted:,} inserted + {load.duplicates:,} duplicates")
    show("", f"+ {load.rejected:,} rejected; {load.amount_inserted:,.0f} inserted")
    show("", f"{load.inserted / max(load.seconds, 1e-9):,.0f} rows/s, every one audited")
    for kind, figures in outcome.latencies.items():
        rate = figures["calls"] / max(outcome.workload_seconds, 1e-9)
        show(
            f"{kind}s",
            f"{figures['calls']:>6,.0f}  {rate:>7,.0f}/s   p50 {figures['p50_ms']:6.2f}  "
            f"p95 {figures['p95_ms']:6.2f}  p99 {figures['p99_ms']:6.2f} ms",
        )
    show("row security", f"{outcome.one_investor} saw {outcome.seen:,} of {outcome.total:,} transactions")
    show("retries", f"{outcome.retries} (one connection was killed in mid-transaction)")
    show("audit", f"{outcome.audited:,} events for {outcome.changes:,} changes")
    show("slow queries", f"{outcome.slow_queries:,} over 1 s")
    show("partitions", f"{outcome.partitions:,} months")
    lines.append("  " + "-" * 74)
    lines += [f"  [{'ok' if passed else 'FAILED'}] {what}" for what, passed in outcome.checks]
    return "\n".join([*lines, ""])


# --- the command --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _demo_database(arguments: argparse.Namespace, journal: _Journal) -> Iterator[tuple[Database, str]]:
    """Yield an open database and a DSN of its owner."""
    if arguments.dsn is not None:
        migrate(arguments.dsn)
        with contextlib.closing(connect(arguments.dsn)) as owner:
            if owner.execute("SELECT 1 FROM public.transactions_clean LIMIT 1").fetchone() is not None:
                raise EquitieDataError(
                    "The database holds transactions already: the demo writes its own, so give it an empty one."
                )
        with Database(Settings(dsn=arguments.dsn, min_size=_INVESTORS + 1, max_size=10), hooks=[journal]) as database:
            yield database, arguments.dsn
        return
    kept = _kept_directory() if arguments.keep else None
    database = Database.embedded(kept, hooks=[journal], min_size=_INVESTORS + 1, max_size=10)
    assert database.owner_dsn is not None  # noqa: S101 - an embedded database has one
    with database:
        yield database, database.owner_dsn
    if kept is not None:
        print(f'kept: Database.embedded("{kept}") opens it again', file=sys.stderr)


def _kept_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="equitie-demo-"))
    directory.chmod(0o711)  # as root the server runs under another account, which must get through to its data
    return directory / "data"


def _known_columns(source: Path, given: dict[str, str]) -> dict[str, str]:
    """Add the headers the demo knows to those that were given."""
    with source.open("rb") as stream:
        header = next(CsvFile(stream, str(source)).records(), None)
    cells = [] if header is None else header.cells
    return {column: field for column, field in _KNOWN_COLUMNS.items() if column in cells} | given


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m equitie_data demo",
        description="Start a PostgreSQL, migrate it, import investments, read and write them as several people under "
        "row-level security, kill a connection on the way, and prove that nothing was lost, doubled or leaked.",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="a CSV of investments (.gz too); generated if left out"
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=FIELD",
        help="what a column of FILE holds; may be repeated",
    )
    parser.add_argument("--rows", type=int, default=100_000, metavar="N", help="how many to generate (default 100,000)")
    parser.add_argument("--dsn", help="an empty database to use, as its owner, instead of a server of the demo's own")
    parser.add_argument("--keep", action="store_true", help="keep the server's data and say where it is")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.rows < 1:
        parser.error("--rows must be at least 1")
    if not all("=" in pair for pair in arguments.map):
        parser.error("--map takes COLUMN=FIELD")

    def run() -> int:
        started = time.perf_counter()
        if arguments.data is None:
            source: Any = csv_stream(arguments.rows)
            columns = {}
        else:
            source = arguments.data
            columns = _known_columns(source, dict(pair.split("=", 1) for pair in arguments.map))
        journal = _Journal()
        with _demo_database(arguments, journal) as (database, operator_dsn):
            outcome = run_demo(database, operator_dsn, source, columns, journal)
        seconds = time.perf_counter() - started
        print(_as_json(outcome, seconds) if arguments.json else _as_table(outcome, seconds))
        return 0 if outcome.holds else 1

    return run_cli(run)


if __name__ == "__main__":
    raise SystemExit(main())
