"""A key makes a write happen once: however many ask at once, from whichever process, whatever befalls them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from equitie_data import Database, acting_as, as_service
from equitie_data.errors import ConfigurationError, SwallowedErrorError
from equitie_data.hooks import StatementEnded
from equitie_data.provision import APPLICATION_ROLE

if TYPE_CHECKING:
    from psycopg import Connection
    from tests.faults.application import Listener
    from tests.faults.ledger import Ledger

    from equitie_data.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("service")]

COUNT_UP = "UPDATE ledger.sessions SET value = value + 1 WHERE session_id = 1 RETURNING value"
VALUE = "SELECT value FROM ledger.sessions WHERE session_id = 1"


@pytest.fixture
def key() -> str:
    return f"request {uuid4()}"


def count_up(connection: Connection[Any]) -> int:
    return int(connection.execute(COUNT_UP).fetchone()[0])  # type: ignore[index]


@pytest.mark.parametrize("as_statement", [False, True], ids=["callable", "statement"])
def test_sixteen_at_once_with_one_key_run_once_and_are_told_the_same(
    ledger: Ledger, application: Database, key: str, as_statement: bool
) -> None:
    barrier = threading.Barrier(16)

    def write(_: int) -> Any:
        with as_service("sixteen"):
            barrier.wait(20)
            return application.execute_write(
                COUNT_UP if as_statement else count_up,
                name="count up",
                idempotency_key=key,
                timeout=30,
            )

    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(write, range(16)))
    assert results == ([[(1,)]] if as_statement else [1]) * 16
    assert ledger.ask(VALUE) == [(1,)]


def test_sixteen_at_once_under_fire_still_run_once(
    ledger: Ledger, application: Database, proxy: TcpProxy, key: str
) -> None:
    stopping = threading.Event()

    def fire() -> None:
        while not stopping.wait(0.03):
            proxy.cut()

    def write(number: int) -> Any:
        with as_service("under fire"):
            return application.execute_write(
                count_up, name="count up", idempotency_key=f"{key} {number % 8}", timeout=30
            )

    gunner = threading.Thread(target=fire)
    gunner.start()
    try:
        with ThreadPoolExecutor(16) as threads:
            results = list(threads.map(write, range(400)))
    finally:
        stopping.set()
        gunner.join()
    assert ledger.ask(VALUE) == [(8,)]
    assert sorted(set(results)) == list(range(1, 9))
    assert set(Counter((number % 8, result) for number, result in enumerate(results)).values()) == {50}


def test_a_repeat_returns_the_first_outcome_without_running_the_operation(
    ledger: Ledger, application: Database, listener: Listener, key: str
) -> None:
    runs: list[int] = []

    def operation(connection: Connection[Any]) -> dict[str, Any]:
        runs.append(1)
        value = count_up(connection)
        return {"value": value, "amount": Decimal("12.50"), "id": uuid4(), "of": (1, None, True, "text", b"bytes")}

    first = application.execute_write(operation, name="pay", idempotency_key=key)
    for _ in range(3):
        assert application.execute_write(operation, name="pay", idempotency_key=key) == first
    assert len(runs) == 1
    assert ledger.ask(VALUE) == [(1,)]
    updates = [event for event in listener.of(StatementEnded) if event.sql.startswith("UPDATE ledger") and event.rows]
    assert len(updates) == 1


_REPEAT = f"""
import json, sys
from equitie_data import Database, as_service
with Database(sys.argv[1]) as database, as_service("another process"):
    result = database.execute_write({COUNT_UP!r}, name="count up", idempotency_key=sys.argv[2], timeout=30)
    print(json.dumps(result))
"""


def test_another_process_gets_the_first_outcome(
    ledger: Ledger, application: Database, app_role_dsn: str, key: str
) -> None:
    def repeat() -> Any:
        program = [sys.executable, "-c", _REPEAT, app_role_dsn, key]
        answer = subprocess.run(program, check=False, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    assert repeat() == [[1]]
    assert application.execute_write(COUNT_UP, name="count up", idempotency_key=key) == [(1,)]
    assert repeat() == [[1]]
    assert ledger.ask(VALUE) == [(1,)]


def test_an_operation_that_fails_leaves_its_key_free(ledger: Ledger, application: Database, key: str) -> None:
    def fails(connection: Connection[Any]) -> int:
        count_up(connection)
        connection.execute("SELECT 1 / 0")
        return 0

    def raises(connection: Connection[Any]) -> int:
        count_up(connection)
        raise LookupError("the application changed its mind")

    def swallows(connection: Connection[Any]) -> int:
        count_up(connection)
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / 0")
        return 0

    for operation, error in (
        (fails, psycopg.errors.DivisionByZero),
        (raises, LookupError),
        (swallows, SwallowedErrorError),
    ):
        with pytest.raises(error):
            application.execute_write(operation, idempotency_key=key)
        assert ledger.ask(VALUE) == [(0,)]
    assert application.execute_write(count_up, idempotency_key=key) == 1
    assert application.execute_write(count_up, idempotency_key=key) == 1
    assert ledger.ask(VALUE) == [(1,)]


def test_whoever_waits_for_a_key_runs_when_the_first_one_fails(ledger: Ledger, application: Database, key: str) -> None:
    holds, lets_go = threading.Event(), threading.Event()

    def first(connection: Connection[Any]) -> int:
        count_up(connection)
        holds.set()
        assert lets_go.wait(20)
        raise LookupError("the first one fails")

    def write(operation: Any) -> Any:
        with as_service("waits"):
            return application.execute_write(operation, idempotency_key=key, timeout=30)

    with ThreadPoolExecutor(2) as threads:
        failing = threads.submit(write, first)
        assert holds.wait(20)
        waiting = threads.submit(write, count_up)
        blocked = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s AND wait_event_type = 'Lock'"
        while ledger.ask(blocked, [APPLICATION_ROLE]) != [(1,)]:
            assert not waiting.done()
        lets_go.set()
        with pytest.raises(LookupError):
            failing.result(30)
        assert waiting.result(30) == 1
    assert ledger.ask(VALUE) == [(1,)]


def test_a_key_belongs_to_who_used_it_and_to_what_for(ledger: Ledger, application: Database, key: str) -> None:
    """Nobody learns another's result by guessing a key, and a key used twice by mistake is noticed."""
    assert application.execute_write(count_up, name="count up", idempotency_key=key) == 1
    with acting_as(uuid4()), pytest.raises(ConfigurationError, match="another actor"):
        application.execute_write(count_up, name="count up", idempotency_key=key)
    with pytest.raises(ConfigurationError, match="another name"):
        application.execute_write(count_up, name="something else", idempotency_key=key)
    assert ledger.ask(VALUE) == [(1,)]


def test_the_login_role_cannot_read_the_keys(ledger: Ledger, application: Database, key: str) -> None:
    application.execute_write(count_up, idempotency_key=key)
    for call in (application.execute_read, application.execute_write):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            call("SELECT key FROM equitie_private.idempotency_keys")


def test_a_key_and_the_write_are_there_together_after_a_crash(
    ledger: Ledger, application: Database, proxy: TcpProxy, key: str
) -> None:
    kept = "SELECT count(*) FROM equitie_private.idempotency_keys WHERE key = %s"
    proxy.cut_before(b"COMMIT")
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, nothing was written
        application.execute_write(count_up, idempotency_key=key, retry=False)
    assert (ledger.ask(VALUE), ledger.ask(kept, [key])) == ([(0,)], [(0,)])
    assert application.execute_write(count_up, idempotency_key=key) == 1
    assert (ledger.ask(VALUE), ledger.ask(kept, [key])) == ([(1,)], [(1,)])
