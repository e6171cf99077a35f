"""In batches: killed anywhere, it goes on; written to meanwhile, nothing is lost; what fails leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from tests.legacy.inspection import fingerprint
from tests.legacy.legacy_platform import World, build

from equitie_data import legacy
from equitie_data.errors import LegacyError

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = World(investors=12, deals=4, companies=6, primary=40, subnominee=9, secondary=5, lived=False)
CLEAN = ("companies_clean", "deals_clean", "investors_clean", "transactions_clean")


class Killed(BaseException):
    """Ends a run the way a kill does: nothing of the program runs after it."""


def migrate(dsn: str, **options: Any) -> legacy.LegacyReport:
    return legacy.migrate(dsn, in_batches=True, batch_rows=15, **options)


def rows_of(conn: psycopg.Connection[Any]) -> dict[str, list[Any]]:
    """Everything in the clean tables, but for numbers that a sequence has drawn."""
    found = {
        table: conn.execute(f"SELECT to_jsonb(t) - 'created_at' - 'updated_at' FROM {table} AS t ORDER BY 1").fetchall()
        for table in CLEAN[:3]
    }
    found["transactions"] = conn.execute(
        "SELECT coalesce(d.equitie_legacy_id, t.transaction_id), t.transaction_type, t.deal_id, t.investor_id,"
        " t.transaction_date, t.amount, t.units, t.status, t.parent_transaction_id, d.term_sheet, d.nominee,"
        " d.seller_name FROM transactions_clean AS t"
        " LEFT JOIN equitie_private.legacy_transaction_details AS d ON d.equitie_transaction_id = t.transaction_id"
        " ORDER BY 2, 1"
    ).fetchall()
    return found


@pytest.fixture
def small(owner: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    build(owner, SMALL)
    return owner


def test_a_run_killed_at_every_batch_boundary_ends_like_one_that_was_not(
    small: psycopg.Connection[Any], owner_dsn: str
) -> None:
    before = fingerprint(small)
    undisturbed = migrate(owner_dsn)
    expected = rows_of(small)
    legacy.rollback(owner_dsn)
    assert fingerprint(small) == before

    boundaries = 0
    for _ in range(500):
        steps = 0

        def kill_at_the_second(step: str, rows: int) -> None:
            nonlocal steps
            steps += 1
            # The first of them is what the killed run did last; every run so does exactly one batch more.
            raise Killed

        try:
            report = migrate(owner_dsn, on_progress=kill_at_the_second)
            break
        except Killed:
            boundaries += 1
            assert small.execute("SELECT state FROM equitie_private.legacy_runs WHERE state = 'copying'").fetchone()
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="read-only while it is taken over"):
                small.execute("UPDATE public.transactions SET notes = 'x'")
    else:
        pytest.fail("it never ends")
    assert boundaries > 25
    assert rows_of(small) == expected
    assert report.counts == undisturbed.counts
    assert legacy.verify(owner_dsn).problems == ()
    legacy.rollback(owner_dsn)
    assert fingerprint(small) == before


RUN = """
import sys
from equitie_data import legacy
legacy.migrate(sys.argv[1], in_batches=True, batch_rows=7)
"""


def test_a_run_that_is_really_killed_goes_on(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    migrate(owner_dsn)
    expected = rows_of(small)
    legacy.rollback(owner_dsn)
    for pause in (0.05, 0.15, 0.3, 0.5):
        process = subprocess.Popen([sys.executable, "-c", RUN, owner_dsn])
        deadline = time.monotonic() + 60
        # From the moment it has begun, it lives for a while longer.
        while process.poll() is None and time.monotonic() < deadline:
            if small.execute("SELECT count(*) > 2 FROM equitie_private.legacy_steps").fetchone() == (True,):
                break
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    migrate(owner_dsn)
    assert rows_of(small) == expected
    assert legacy.verify(owner_dsn).problems == ()


def test_staging_lost_in_a_crash_of_the_server_is_read_again(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    def kill_late(step: str, rows: int) -> None:
        if step == "insert:subnominee":
            raise Killed

    with pytest.raises(Killed):
        migrate(owner_dsn, on_progress=kill_late)
    small.execute("TRUNCATE equitie_private.legacy_staging_transaction")
    report = migrate(owner_dsn)
    assert (report.rows("primary"), report.rows("subnominee"), report.rows("secondary")) == (40, 9, 5)
    assert legacy.verify(owner_dsn).problems == ()


def test_an_unfinished_run_is_rolled_back(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    before = fingerprint(small)

    def kill_late(step: str, rows: int) -> None:
        if step == "insert:secondary":
            raise Killed

    with pytest.raises(Killed):
        migrate(owner_dsn, on_progress=kill_late)
    with pytest.raises(LegacyError, match="was broken off and goes on with the options it began with"):
        legacy.migrate(owner_dsn, legacy.Options(on_conflict="latest"))
    with pytest.raises(LegacyError, match="broken off, run it again"):
        legacy.verify(owner_dsn)
    done = legacy.rollback(owner_dsn)
    assert done.restored == ()
    assert fingerprint(small) == before
    assert [small.execute(f"SELECT count(*) FROM {table}").fetchone() for table in CLEAN] == [(0,)] * 4
    small.execute("UPDATE public.transactions SET notes = 'x' WHERE transaction_id = 1")


def test_what_others_changed_in_copied_rows_stops_the_undoing(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    def kill_late(step: str, rows: int) -> None:
        if step == "insert:secondary":
            raise Killed

    with pytest.raises(Killed):
        migrate(owner_dsn, on_progress=kill_late)
    small.execute("UPDATE investors_clean SET phone = '1' WHERE investor_id = 3")
    with pytest.raises(LegacyError, match=r"changed by others since \(1 in investors_clean"):
        legacy.rollback(owner_dsn)
    legacy.rollback(owner_dsn, discard_new=True)
    assert small.execute("SELECT count(*) FROM investors_clean").fetchone() == (0,)


def test_an_undoing_that_was_killed_is_finished_first(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    def kill_late(step: str, rows: int) -> None:
        if step == "insert:secondary":
            raise Killed

    with pytest.raises(Killed):
        migrate(owner_dsn, on_progress=kill_late)
    small.execute("UPDATE equitie_private.legacy_runs SET state = 'undoing'")
    small.execute("DELETE FROM transactions_clean WHERE transaction_type = 'secondary'")
    assert migrate(owner_dsn).rows("secondary") == 5
    assert legacy.verify(owner_dsn).problems == ()


def test_a_write_that_got_around_the_block_stops_the_switch(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    def tamper(step: str, rows: int) -> None:
        if step == "insert:primary":
            with small.transaction():
                small.execute("ALTER TABLE core.transactions DISABLE TRIGGER equitie_legacy_read_only")
                small.execute("UPDATE core.transactions SET notes = 'x' WHERE transaction_id = 3")
                small.execute("ALTER TABLE core.transactions ENABLE ALWAYS TRIGGER equitie_legacy_read_only")

    with pytest.raises(LegacyError, match=r"core\.transactions was written to although it is read-only"):
        migrate(owner_dsn, on_progress=tamper)
    assert [small.execute(f"SELECT count(*) FROM {table}").fetchone() for table in CLEAN] == [(0,)] * 4
    assert small.execute("SELECT state FROM equitie_private.legacy_runs").fetchall() == [("undone",)]
    small.execute("UPDATE core.transactions SET notes = NULL WHERE transaction_id = 3")
    assert migrate(owner_dsn).rows("primary") == 40


@contextlib.contextmanager
def writer(dsn: str) -> Iterator[tuple[list[int], list[str]]]:
    """A session of old code that goes on inserting and correcting, whatever the table turns into."""
    stop = threading.Event()
    written: list[int] = []
    refused: list[str] = []

    def work() -> None:
        number = 100_000
        with psycopg.connect(dsn, autocommit=True) as conn:
            while not stop.is_set():
                number += 1
                try:
                    conn.execute(
                        'INSERT INTO public."transactions.transaction.primary"'
                        " (transaction_id, deal_id, investor_id, transaction_date, status, amount, currency)"
                        " VALUES (%s, 1, 1, '2024-05-05', 'completed', 1, 'USD')",
                        (number,),
                    )
                    written.append(number)
                except psycopg.errors.ObjectNotInPrerequisiteState as error:
                    refused.append(str(error))
                time.sleep(0.002)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield written, refused
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("in_batches", [False, True])
def test_a_writer_loses_nothing(small: psycopg.Connection[Any], owner_dsn: str, in_batches: bool) -> None:
    with writer(owner_dsn) as (written, refused):
        while len(written) < 20:
            time.sleep(0.01)
        legacy.migrate(owner_dsn, in_batches=in_batches, batch_rows=15)
        after = len(written)
        deadline = time.monotonic() + 30
        while len(written) < after + 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    # In one transaction the writer waits; in batches it is told to come back. Then it goes on, through the view.
    assert bool(refused) == in_batches
    assert len(written) >= after + 5
    for relation in ("transactions_clean", 'public."transactions.transaction.primary"', "core.transactions"):
        found = small.execute(
            f"SELECT transaction_id FROM {relation} WHERE transaction_id BETWEEN 100001 AND 999999 ORDER BY 1"
        ).fetchall()
        assert [row[0] for row in found] == written


def test_a_reader_in_the_way_is_waited_for(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn) as reader:
        reader.execute("SELECT FROM public.transactions")
        release = threading.Timer(1.0, reader.rollback)
        release.start()
        report = legacy.migrate(owner_dsn, lock_timeout=0.3)
        release.join()
    assert report.rows("primary") == 40
