"""One fault at a time, at an exact place: how often the operation runs, what its caller is told, what is there."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from tests.faults.application import Listener, crash_and_recover, settings, wait_until
from tests.faults.ledger import Discrepancies, Transfer

from equitie_data import Database, as_service
from equitie_data.errors import CommitOutcomeUnknown, ResultLostError, UnavailableError
from equitie_data.hooks import CommitResolved, OperationEnded, Retried
from equitie_data.provision import APPLICATION_ROLE
from equitie_data.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection
    from tests.faults.ledger import Ledger

    from equitie_data.embedded import EmbeddedServer
    from equitie_data.tcp_proxy import Direction, Fault

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("service")]

FORMS = {
    "callable": {"as_statement": False},
    "callable keyed": {"as_statement": False, "key": "key 1"},
    "statement": {"as_statement": True},
    "statement keyed": {"as_statement": True, "key": "key 2"},
}


@pytest.fixture(params=FORMS.values(), ids=list(FORMS))
def transfer(request: pytest.FixtureRequest) -> Transfer:
    """A transfer in each form, with and without a key."""
    return fresh_transfer(**request.param)


@pytest.fixture(params=list(FORMS.values())[:2], ids=list(FORMS)[:2])
def called(request: pytest.FixtureRequest) -> Transfer:
    """A transfer as a callable, with and without a key."""
    return fresh_transfer(**request.param)


def fresh_transfer(*, as_statement: bool = False, key: str | None = None) -> Transfer:
    transfer = Transfer(1, 1, 2, 5, as_statement=as_statement)
    transfer.key = None if key is None else f"{key} of {transfer.transfer_id}"
    return transfer


@pytest.fixture
def proxy(app_role_dsn: str) -> Iterator[TcpProxy]:
    """A link long enough for statements to go in one trip with their commit, unless they bear a key."""
    with TcpProxy(app_role_dsn, delay=0.0005) as proxy:
        yield proxy


def commit_of(transfer: Transfer) -> bytes:
    """What to look for in the statement that commits."""
    return b"WITH moved" if transfer.as_statement and transfer.key is None else b"COMMIT"


def attempts(listener: Listener) -> list[int]:
    return [event.attempts for event in listener.of(OperationEnded) if event.name == "transfer"]


# --- a COMMIT that is not answered --------------------------------------------------------------------------------


def test_a_commit_whose_reply_is_lost_is_found_committed(
    ledger: Ledger, application: Database, proxy: TcpProxy, listener: Listener, transfer: Transfer
) -> None:
    fault = proxy.cut_reply_to(commit_of(transfer))
    try:
        assert transfer.make(application, timeout=20) == 1
    except ResultLostError:
        # One trip brings the result and the commit's reply together, and only a key would have kept the result.
        assert transfer.as_statement
        assert transfer.key is None
    assert fault.struck.is_set()
    assert transfer.told == "acknowledged"
    assert ledger.compare([transfer]) == Discrepancies()
    assert [event.outcome for event in listener.of(CommitResolved)] == ["committed"]


def test_a_single_attempt_whose_reply_is_lost_is_not_called_uncommitted(
    ledger: Ledger, application: Database, proxy: TcpProxy, transfer: Transfer
) -> None:
    fault = proxy.cut_reply_to(commit_of(transfer))
    with suppress(CommitOutcomeUnknown, ResultLostError):
        assert transfer.make(application, timeout=20, retry=False) == 1
    assert fault.struck.is_set()
    assert ledger.times_there(transfer) == 1
    assert ledger.compare([transfer]) == Discrepancies()


def test_a_statement_without_returning_gets_its_row_count_whatever_happens_to_the_reply(
    ledger: Ledger, application: Database, proxy: TcpProxy
) -> None:
    count_up = "UPDATE ledger.sessions SET value = value + 1 WHERE session_id <= 3"
    fault = proxy.cut_reply_to(b"UPDATE ledger.sessions")
    with suppress(ResultLostError):
        assert application.execute_write(count_up, timeout=20) == 3
    assert fault.struck.is_set()
    assert ledger.ask("SELECT sum(value) FROM ledger.sessions") == [(3,)]


def test_a_commit_that_never_arrives_is_found_aborted_and_made_again(
    ledger: Ledger, application: Database, proxy: TcpProxy, listener: Listener, transfer: Transfer
) -> None:
    fault = proxy.cut_before(commit_of(transfer))
    assert transfer.make(application, timeout=20) == 1
    assert fault.struck.is_set()
    assert ledger.compare([transfer]) == Discrepancies()
    assert ledger.times_there(transfer) == 1
    assert attempts(listener) == [2]
    assert {event.outcome for event in listener.of(CommitResolved)} <= {"aborted"}


def test_a_transaction_left_open_on_the_server_is_ended_before_it_is_made_again(
    ledger: Ledger, application: Database, proxy: TcpProxy, listener: Listener, transfer: Transfer
) -> None:
    """The server does not know that its client is gone: the transaction keeps its locks and could still commit."""
    fault = proxy.cut_before(commit_of(transfer), half_open=True)
    assert transfer.make(application, timeout=20) == 1
    assert fault.struck.is_set()
    assert ledger.compare([transfer]) == Discrepancies()
    assert ledger.times_there(transfer) == 1
    assert attempts(listener) == [2]
    open_ones = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s AND backend_xid IS NOT NULL"
    assert ledger.ask(open_ones, [APPLICATION_ROLE]) == [(0,)]


def test_a_commit_that_nobody_can_be_asked_about_in_time_is_unknown(
    ledger: Ledger, application: Database, proxy: TcpProxy, transfer: Transfer
) -> None:
    proxy.cut_reply_to(commit_of(transfer), then=proxy.stop)
    with pytest.raises(CommitOutcomeUnknown):
        transfer.make(application, timeout=3)
    assert ledger.times_there(transfer) == 1
    proxy.start()
    if transfer.key is not None:  # what keys are for: the same call again tells what became of it
        assert transfer.make(application, timeout=20) == 1
    assert ledger.compare([transfer]) == Discrepancies()


def crash_and_reuse_ids(ledger: Ledger, pid: int, xid: str) -> None:
    """Crash the server under an open transaction, and give its id to somebody else's, which commits."""
    started = ledger.ask("SELECT pg_postmaster_start_time()")
    os.kill(pid, signal.SIGKILL)

    def is_reused() -> bool:
        try:
            ledger.ask("SELECT pg_current_xact_id()")
            return ledger.ask("SELECT pg_xact_status(%s::xid8)", [xid]) == [("committed",)]
        except (psycopg.OperationalError, psycopg.errors.InvalidParameterValue):
            return False

    wait_until(is_reused)
    assert ledger.ask("SELECT pg_postmaster_start_time()") == started, "a crash restart keeps the main process"


def test_a_transaction_id_given_out_again_after_a_crash_is_not_taken_for_ours(
    primary: EmbeddedServer, ledger: Ledger, application: Database, proxy: TcpProxy, called: Transfer
) -> None:
    """`pg_xact_status` then says "committed" of an id whose transaction is lost: it tells another's fate."""
    transfer = called
    proxy.cut_before(b"COMMIT", then=lambda: crash_and_reuse_ids(ledger, *seen[0]))
    seen: list[tuple[int, str]] = []

    def operation(connection: Connection[Any]) -> int:
        value = transfer.operation(connection)
        row = connection.execute("SELECT pg_backend_pid(), pg_current_xact_id()::text").fetchone()
        assert row is not None
        seen.append(row)
        return value

    def write() -> int:
        return application.execute_write(operation, name="transfer", idempotency_key=transfer.key, timeout=30)

    if transfer.key is not None:
        assert write() == 1
        assert len(seen) == 2
        assert ledger.times_there(transfer) == 1
    else:
        with pytest.raises(CommitOutcomeUnknown):
            write()
        assert len(seen) == 1
        assert ledger.times_there(transfer) == 0


def test_a_commit_answered_just_before_the_server_dies_is_not_made_twice(
    primary: EmbeddedServer, ledger: Ledger, application: Database, proxy: TcpProxy, called: Transfer
) -> None:
    transfer = called
    proxy.cut_reply_to(b"COMMIT", then=lambda: crash_and_recover(primary))
    try:
        assert transfer.make(application, timeout=30) == 1
    except CommitOutcomeUnknown:
        assert transfer.key is None
    assert ledger.times_there(transfer) == 1


# --- at every byte ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_a_connection_cut_at_any_byte_makes_nothing_twice_and_loses_nothing(
    ledger: Ledger, proxy: TcpProxy, listener: Listener, direction: Direction, form: dict[str, Any]
) -> None:
    made: list[Transfer] = []

    def make_one() -> None:
        made.append(fresh_transfer(**form))
        with suppress(ResultLostError):
            made[-1].make(database, timeout=20)

    with Database(settings(proxy.dsn, min_size=1, max_size=1), hooks=[listener]) as database:
        # Beyond the fifth time, statements are prepared and a transfer is a few hundred bytes each way.
        for _ in range(8):
            make_one()
        struck = 0
        for count in range(0, 2_000, 11):
            fault = proxy.cut_after(count, direction)
            make_one()
            if not fault.struck.is_set():
                proxy.disarm()
                break
            struck += 1
            make_one()  # and the connection that came out of it is in order
    assert struck >= 8
    assert ledger.compare(made) == Discrepancies()
    assert {transfer.told for transfer in made} == {"acknowledged"}


# --- outages ------------------------------------------------------------------------------------------------------


def test_a_write_rides_out_an_outage_within_its_deadline(
    ledger: Ledger, application: Database, proxy: TcpProxy, transfer: Transfer
) -> None:
    proxy.stop()
    back = threading.Timer(1.5, proxy.start)
    back.start()
    try:
        assert transfer.make(application, timeout=20) == 1
    finally:
        back.join()
    assert ledger.compare([transfer]) == Discrepancies()


def test_a_write_that_cannot_be_made_in_time_is_refused_and_not_there(
    ledger: Ledger, application: Database, proxy: TcpProxy, transfer: Transfer
) -> None:
    proxy.stop()
    with pytest.raises(UnavailableError):
        transfer.make(application, timeout=1)
    proxy.start()
    assert ledger.compare([transfer]) == Discrepancies()
    assert fresh_transfer(as_statement=transfer.as_statement).make(application, timeout=20) == 1


def test_a_link_that_goes_quiet_for_a_second_costs_nothing(
    ledger: Ledger, application: Database, proxy: TcpProxy, transfer: Transfer
) -> None:
    proxy.go_deaf()
    back = threading.Timer(1.0, proxy.hear)
    back.start()
    try:
        assert transfer.make(application, timeout=20) == 1
    finally:
        back.join()
    assert ledger.compare([transfer]) == Discrepancies()
    assert ledger.times_there(transfer) == 1


def test_a_crash_in_mid_operation_is_ridden_out(ledger: Ledger, application: Database, listener: Listener) -> None:
    transfer = fresh_transfer()
    runs: list[int] = []

    def operation(connection: Connection[Any]) -> int:
        value = transfer.operation(connection)
        runs.append(connection.info.backend_pid)
        if len(runs) == 1:
            pid = ledger.ask("SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction'")[0][0]
            os.kill(pid, signal.SIGKILL)
            connection.execute("SELECT pg_sleep(20)")
        return value

    assert application.execute_write(operation, name="transfer", timeout=30) == 1
    assert ledger.times_there(transfer) == 1
    assert len(runs) == 2


def test_a_restart_under_fifty_idle_connections_costs_no_failed_call(
    primary: EmbeddedServer, ledger: Ledger, app_role_dsn: str, listener: Listener
) -> None:
    with Database(settings(app_role_dsn, min_size=50, max_size=50), hooks=[listener]) as database:
        wait_until(lambda: database.pool.primary.stats()["idle"] == 50)
        primary.restart()

        def call(number: int) -> bool:
            with as_service("restart"):
                if number % 2:
                    return database.execute_read("SELECT true") == [(True,)]
                return bool(database.execute_write("UPDATE ledger.sessions SET value = value + 1 WHERE session_id = 1"))

        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(call, range(200)))
    assert ledger.ask("SELECT value FROM ledger.sessions WHERE session_id = 1") == [(100,)]
    assert [event.error for event in listener.of(OperationEnded)] == [None] * 200
    assert listener.of(Retried) == []


# --- a server that says no ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["at a statement", "at commit"])
def test_a_full_disk_is_told_at_once_and_leaves_nothing(
    ledger: Ledger, application: Database, listener: Listener, when: Any, transfer: Transfer
) -> None:
    ledger.fill_disk(when)
    with pytest.raises(psycopg.errors.DiskFull):
        transfer.make(application, timeout=20)
    assert ledger.compare([transfer]) == Discrepancies()
    assert attempts(listener) == [1]
    assert listener.of(Retried) == []
    ledger.fill_disk("never")
    assert transfer.make(application, timeout=20) == 1  # the key, if there is one, was left free
    assert ledger.compare([transfer]) == Discrepancies()


@pytest.fixture
def full_house(ledger: Ledger) -> Iterator[Callable[[int], None]]:
    def limit(connections: int) -> None:
        ledger.ask(f"ALTER ROLE {APPLICATION_ROLE} CONNECTION LIMIT {connections}")

    yield limit
    limit(-1)


def test_a_server_without_a_free_connection_is_waited_for(
    ledger: Ledger, application: Database, full_house: Callable[[int], None]
) -> None:
    transfer = fresh_transfer()
    full_house(0)
    ledger.ask("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s", [APPLICATION_ROLE])
    opened = threading.Timer(1.0, full_house, [-1])
    opened.start()
    try:
        assert transfer.make(application, timeout=20) == 1
    finally:
        opened.join()
    assert ledger.compare([transfer]) == Discrepancies()


def test_a_server_that_stays_full_is_named_as_the_reason(
    ledger: Ledger, application: Database, full_house: Callable[[int], None]
) -> None:
    full_house(0)
    ledger.ask("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s", [APPLICATION_ROLE])
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"too many connections|no free connection"):
        fresh_transfer().make(application, timeout=2)
    assert time.monotonic() - started < 2 + 10, "it was told long after the deadline"


# --- the proxy's own statements, on a real server -----------------------------------------------------------------


def test_faults_strike_at_statements_of_every_kind(app_role_dsn: str, proxy: TcpProxy, ledger: Ledger) -> None:
    ledger.ask("CREATE TABLE ledger.marks (mark int)")
    ledger.ask("GRANT ALL ON ledger.marks TO service_role")

    def mark(number: int, prepare: bool, fault: Callable[[], Fault]) -> Fault:
        with psycopg.connect(proxy.dsn, autocommit=True) as connection:
            connection.execute("SET ROLE service_role")
            for _ in range(2):
                connection.execute("INSERT INTO ledger.marks SELECT %s WHERE false", [number], prepare=prepare)
            armed = fault()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("INSERT INTO ledger.marks SELECT %s WHERE true", [number], prepare=prepare)
            assert connection.closed
            return armed

    for place, prepare in enumerate((False, True)):
        assert mark(place, prepare, lambda: proxy.cut_reply_to(b"INSERT")).struck.is_set()
        assert mark(10 + place, prepare, lambda: proxy.cut_before(b"INSERT")).struck.is_set()
    assert sorted(ledger.ask("SELECT mark FROM ledger.marks")) == [(0,), (1,)]
