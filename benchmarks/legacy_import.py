"""The takeover of the old tables at size: rate, memory, disk, and what a kill in the middle costs.

The old tables are generated as they really are (three copies of every primary transaction, subnominee and secondary
rows beside them), then taken over three times, each time in a database of its own:

- *bare*: the peer. One ``INSERT ... SELECT DISTINCT ON`` per kind into the same clean tables, with the same triggers,
  audit trail and indexes, by somebody who trusts every row: nothing is checked, listed, compared or remembered;
- *in batches*: `legacy.migrate`;
- *killed*: the same, killed with SIGKILL again and again, and run again until it is done.

Run it: ``python benchmarks/legacy_import.py [--rows N]``, where N counts the rows of the old transaction tables.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from equitie_data import legacy, migrate
from equitie_data.embedded import EmbeddedServer
from measuring import save

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parents[1]
SERVER = {
    "shared_buffers": "2GB",
    "maintenance_work_mem": "256MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "fsync": "off",
    "jit": "off",
    "max_locks_per_transaction": "256",
}
COLUMNS = (
    "transaction_id, deal_id, investor_id, transaction_date, status, units, unit_price, gross_capital, net_capital,"
    " amount, currency, admin_fee, management_fee_percent, performance_fee_percent, structuring_fee_percent,"
    " premium_fee_percent, parent_transaction_id, created_at, updated_at"
)
COPIES = ('public."transactions.transaction.primary"', "public.transactions", "core.transactions")
_COPIED = " UNION ALL ".join(f"SELECT {COLUMNS} FROM {copy}" for copy in COPIES)
BARE = f"""
INSERT INTO companies_clean SELECT * FROM public."companies.company";
INSERT INTO deals_clean SELECT * FROM public."deals.deal";
INSERT INTO investors_clean
SELECT investor_id, full_name, primary_email, investor_type, investor_status, kyc_status, nationality,
  country_of_residence, phone, join_date, created_at, updated_at
FROM public."investors.investor";
ANALYZE companies_clean, deals_clean, investors_clean;
INSERT INTO transactions_clean ({COLUMNS}, transaction_type)
SELECT DISTINCT ON (c.transaction_id) c.*, 'primary'
FROM ({_COPIED}) AS c
ORDER BY c.transaction_id;
INSERT INTO transactions_clean
  (deal_id, investor_id, transaction_date, transaction_type, status, amount, currency, parent_transaction_id)
SELECT p.deal_id, i.investor_id, p.transaction_date, 'subnominee', p.status, s.gross_capital_subnominee, p.currency,
  s.transaction
FROM public."transactions.transaction.subnominee" AS s
JOIN public."transactions.transaction.primary" AS p ON p.transaction_id = s.transaction
JOIN investors_clean AS i ON i.full_name = replace(s.sub_nominee_investor_link, '  number', ' Number');
INSERT INTO transactions_clean
  (deal_id, investor_id, transaction_date, transaction_type, status, amount, currency, units, unit_price,
   parent_transaction_id)
SELECT p.deal_id, i.investor_id, s.secondary_transaction_date, 'secondary', 'completed',
  s.number_of_unit_sold * s.price_per_unit_sold, p.currency, s.number_of_unit_sold, s.price_per_unit_sold, s.transaction
FROM public."transactions.transaction.secondary" AS s
JOIN public."transactions.transaction.primary" AS p ON p.transaction_id = s.transaction
JOIN investors_clean AS i ON i.full_name = s.buyer_name;
"""
RUN = """
import resource, sys
from equitie_data import legacy
legacy.migrate(sys.argv[1], in_batches=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def make(server: EmbeddedServer, name: str, rows: int) -> str:
    """Create a migrated database with old tables of about so many transaction rows."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name}".encode())
    dsn = server.dsn(name)
    migrate.migrate(dsn)
    # The generator is the tests' own: it stands outside of this directory.
    sys.path.insert(0, str(ROOT))
    platform: Any = importlib.import_module("tests.legacy.legacy_platform")
    world = platform.World(
        investors=5_000,
        deals=500,
        companies=600,
        primary=rows * 30 // 100,
        subnominee=rows * 8 // 100,
        secondary=rows * 2 // 100,
        lived=False,
    )
    with psycopg.connect(dsn, autocommit=True) as conn:
        platform.build(conn, world)
        conn.execute("VACUUM ANALYZE")
        conn.execute("CHECKPOINT")
    return dsn


def count(dsn: str) -> int:
    """Count the clean transactions."""
    with psycopg.connect(dsn) as conn:
        row = conn.execute("SELECT count(*) FROM transactions_clean").fetchone()
    assert row is not None
    return int(row[0])


def bare(dsn: str) -> float:
    """Take the old tables over by hand; return the seconds it took."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        started = time.perf_counter()
        conn.execute(
            "SELECT equitie_private.ensure_month_partitions('public.transactions_clean',"
            " (current_date - interval '8 years')::date, current_date)"
        )
        with conn.transaction():
            conn.execute(BARE.encode())
        return time.perf_counter() - started


class Watch:
    """The largest private memory a server process had while a run went on, in MB."""

    def __init__(self, dsn: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(dsn,))
        self.largest = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self, dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as conn:
            while not self._stop.wait(0.5):
                for (pid,) in conn.execute(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                ):
                    path = Path(f"/proc/{pid}/status")
                    if path.exists():
                        lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
                        # Shared buffers are everybody's.
                        self.largest = max(self.largest, int(lines.get("RssAnon", "0 kB").split()[0]) // 1024)


def in_batches(dsn: str) -> tuple[legacy.LegacyReport, dict[str, float]]:
    """Take the old tables over; return the report and the seconds of every step."""
    steps: dict[str, float] = {}
    last = time.perf_counter()

    def note(step: str, _rows: int) -> None:
        nonlocal last
        now = time.perf_counter()
        label = step.partition(":")[0]
        steps[label] = steps.get(label, 0.0) + now - last
        last = now

    report = legacy.migrate(dsn, in_batches=True, on_progress=note)
    steps["switch"] = time.perf_counter() - last
    return report, steps


def killed(dsn: str, seconds: float) -> tuple[float, int, int]:
    """Kill runs after a while, each later than the one before; return the seconds of all, kills, and MB of the last."""
    started = time.perf_counter()
    for kills in range(1_000):
        process = subprocess.Popen([sys.executable, "-c", RUN, dsn], stdout=subprocess.PIPE, text=True)
        try:
            output, _ = process.communicate(timeout=seconds / 4 if kills < 3 else None)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        else:
            assert process.returncode == 0
            return time.perf_counter() - started, kills, int(output)
    raise AssertionError


def main() -> None:
    """Run the three, print their figures, keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the old transaction tables (1,000,000)")
    parser.add_argument("--without-kills", action="store_true", help="leave the third run out")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"rows": arguments.rows}
    with EmbeddedServer(settings=SERVER) as server:
        dsn = make(server, "bare", arguments.rows)
        results["bare_seconds"] = bare(dsn)
        wanted = count(dsn)
        print(f"bare INSERT ... SELECT  {results['bare_seconds']:8.1f} s  {wanted:,} clean rows")
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute("DROP DATABASE bare")

        dsn = make(server, "batches", arguments.rows)
        with Watch(dsn) as watch:
            report, steps = in_batches(dsn)
        assert count(dsn) == wanted
        started = time.perf_counter()
        assert legacy.verify(dsn).problems == ()
        verified = time.perf_counter() - started
        results |= {
            "seconds": report.seconds,
            "steps": steps,
            "verify_seconds": verified,
            "server_mb": watch.largest,
            "report": report.to_dict(),
        }
        rate = arguments.rows / report.seconds
        ratio = report.seconds / results["bare_seconds"]
        print(f"legacy migrate          {report.seconds:8.1f} s  {rate:,.0f} old rows/s, {ratio:.2f} x the bare one")
        print("  " + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in steps.items()))
        print(f"  largest server process {watch.largest} MB; verify {verified:.1f} s")
        storage = report.storage
        assert storage is not None
        print(
            f"  storage {storage.transactions_before / 2**20:,.0f} -> {storage.transactions_after / 2**20:,.0f} MB"
            f" ({storage.saved:.1%} saved), without what is carried along {storage.saved_clean:.1%}"
        )
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute("DROP DATABASE batches")

        if not arguments.without_kills:
            dsn = make(server, "killed", arguments.rows)
            seconds, kills, megabytes = killed(dsn, report.seconds)
            assert count(dsn) == wanted
            assert legacy.verify(dsn).problems == ()
            results |= {"killed_seconds": seconds, "kills": kills, "client_mb": megabytes}
            print(f"killed {kills} times          {seconds:8.1f} s  client {megabytes} MB")
    save("legacy_import", results)


if __name__ == "__main__":
    main()
