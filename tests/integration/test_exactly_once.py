"""Lost replies, repeated keys, and how many trips it all takes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from equitie_data import CommitOutcomeUnknown, Database, Settings, acting_as, as_service
from equitie_data.errors import ConfigurationError, ResultLostError
from equitie_data.hooks import CommitResolved, OperationEnded, Retried
from equitie_data.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

ADD = "INSERT INTO public.companies_clean (company_name) VALUES (%s)"
COUNT = "SELECT count(*) FROM public.companies_clean WHERE company_name = %s"


class Listener:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: object) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def proxy(app_dsn: str) -> Iterator[TcpProxy]:
    with TcpProxy(app_dsn) as proxy:
        yield proxy


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def database(proxy: TcpProxy, listener: Listener) -> Iterator[Database]:
    with Database(Settings(dsn=proxy.dsn, max_size=5), hooks=[listener]) as database, as_service("test"):
        database.hooks.remove(database.monitor)
        yield database


def set_distance(database: Database, seconds: float) -> None:
    """Have the library believe that a trip takes so long; below 0.2 ms writes take two trips."""
    database.pool._health.stop(5)
    database.pool.primary.round_trip = seconds


def rows(owner_dsn: str, name: str) -> int:
    with psycopg.connect(owner_dsn) as owner:
        return owner.execute(COUNT, [name]).fetchone()[0]  # type: ignore[index]


# --- trips --------------------------------------------------------------------------------------------------------


def trips(proxy: TcpProxy, call: Any) -> float:
    for _ in range(8):  # connections made, statements prepared
        call()
    before = proxy.round_trips
    for _ in range(10):
        call()
    return (proxy.round_trips - before) / 10


def test_a_statement_takes_one_trip_and_a_callable_two(proxy: TcpProxy, database: Database) -> None:
    set_distance(database, 0.001)
    update = "UPDATE public.companies_clean SET company_sector = %s WHERE company_id = 0"
    with acting_as(uuid4()):
        assert trips(proxy, lambda: database.execute_read("SELECT %s::int", [1])) == 1
        # The second trip is the COMMIT, whose reply is on its way while the result is used already.
        # As nobody waits for it, the first and the last of them may be counted or not.
        count = trips(proxy, lambda: database.execute_read(lambda conn: conn.execute("SELECT 1").fetchall()))
        assert count == pytest.approx(2, abs=0.2)
    assert trips(proxy, lambda: database.execute_write(update, ["x"])) == 1
    assert trips(proxy, lambda: database.execute_write(lambda conn: conn.execute(update, ["x"]).rowcount)) == 2
    set_distance(database, 0.0)
    assert trips(proxy, lambda: database.execute_write(update, ["x"])) == 2


# --- lost replies -------------------------------------------------------------------------------------------------


def test_a_lost_reply_to_commit_is_resolved_and_the_result_returned(
    proxy: TcpProxy, database: Database, listener: Listener, owner_dsn: str
) -> None:
    database.execute_write("SELECT 1")
    proxy.cut_reply_to(b"COMMIT")
    assert database.execute_write(lambda conn: conn.execute(ADD, ["a"]).rowcount) == 1
    assert [event.outcome for event in listener.of(CommitResolved)] == ["committed"]
    assert rows(owner_dsn, "a") == 1


def test_so_is_that_of_a_statement_that_takes_two_trips(
    proxy: TcpProxy, database: Database, listener: Listener, owner_dsn: str
) -> None:
    set_distance(database, 0.0)
    proxy.cut_reply_to(b"COMMIT")
    assert database.execute_write(ADD + " RETURNING company_name", ["b"]) == [("b",)]
    assert [event.outcome for event in listener.of(CommitResolved)] == ["committed"]
    assert rows(owner_dsn, "b") == 1


def test_a_commit_that_never_arrived_is_run_again(
    proxy: TcpProxy, database: Database, listener: Listener, owner_dsn: str
) -> None:
    runs: list[int] = []

    def operation(conn: Connection[Any]) -> str:
        runs.append(conn.info.backend_pid)
        conn.execute(ADD, ["c"])
        if len(runs) == 1:
            # Killed while the client is about to send COMMIT: the message meets a dead backend.
            with psycopg.connect(owner_dsn, autocommit=True) as owner:
                owner.execute("SELECT pg_terminate_backend(%s, 5000)", runs)
        return "done"

    assert database.execute_write(operation) == "done"
    assert len(runs) == 2
    assert [event.outcome for event in listener.of(CommitResolved)] == ["aborted"]
    assert rows(owner_dsn, "c") == 1


def test_a_statement_in_one_trip_whose_reply_is_lost_says_that_it_is_committed(
    proxy: TcpProxy, database: Database, listener: Listener, owner_dsn: str
) -> None:
    set_distance(database, 0.001)
    proxy.cut_reply_to(b"INSERT INTO public.companies_clean")
    with pytest.raises(ResultLostError, match="is committed"):
        database.execute_write(ADD, ["d"])
    assert [event.outcome for event in listener.of(CommitResolved)] == ["committed"]
    assert rows(owner_dsn, "d") == 1


def test_a_statement_in_one_trip_that_never_arrived_is_run_again(
    proxy: TcpProxy, database: Database, listener: Listener, owner_dsn: str
) -> None:
    set_distance(database, 0.001)
    for _ in range(3):
        database.execute_write("SELECT 1")
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        # Refused while it runs, before its commit: the connection ends and nothing is there.
        owner.execute(
            "CREATE FUNCTION public.die() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS "
            "$$BEGIN IF (SELECT count(*) FROM public.deaths) = 0 THEN "
            "PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5); END IF; RETURN NEW; END$$"
        )
        owner.execute("CREATE TABLE public.deaths (n int)")
        owner.execute(
            "CREATE TRIGGER die BEFORE INSERT ON public.companies_clean FOR EACH ROW EXECUTE FUNCTION public.die()"
        )
    alive = threading.Thread(target=_bury, args=(owner_dsn,))
    alive.start()
    assert database.execute_write(ADD, ["e"]) == 1
    alive.join()
    assert rows(owner_dsn, "e") == 1


def _bury(owner_dsn: str) -> None:
    import time

    time.sleep(0.3)
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("INSERT INTO public.deaths VALUES (1)")


def test_an_outcome_nobody_knows_is_reported_unknown(
    proxy: TcpProxy, database: Database, owner_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equitie_data import resolve

    monkeypatch.setattr(resolve, "_STATUS", "SELECT NULL::text WHERE %s::text IS NOT NULL")
    proxy.cut_reply_to(b"COMMIT")
    with pytest.raises(CommitOutcomeUnknown, match="look for what it would have written"):
        database.execute_write(lambda conn: conn.execute(ADD, ["f"]).rowcount, timeout=2.0)
    assert rows(owner_dsn, "f") == 1


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_repeated_key_returns_the_first_result_without_running(database: Database, owner_dsn: str) -> None:
    runs: list[int] = []

    def operation(conn: Connection[Any]) -> tuple[Decimal, list[int]]:
        runs.append(1)
        conn.execute(ADD, ["key"])
        return Decimal("1.50"), [1, 2]

    key = f"pay-{uuid4()}"
    results = [database.execute_write(operation, idempotency_key=key) for _ in range(3)]
    assert results == [(Decimal("1.50"), [1, 2])] * 3
    assert len(runs) == 1
    statement = f"statement-{uuid4()}"
    returned = [
        database.execute_write(ADD + " RETURNING company_name", ["keyed"], idempotency_key=statement) for _ in range(3)
    ]
    assert returned == [[("keyed",)]] * 3
    assert rows(owner_dsn, "key") == rows(owner_dsn, "keyed") == 1


def test_sixteen_at_once_with_one_key_run_once(app_dsn: str, owner_dsn: str) -> None:
    key, runs, barrier = f"burst-{uuid4()}", [], threading.Barrier(16)

    def operation(conn: Connection[Any]) -> str:
        runs.append(1)
        conn.execute(ADD, ["burst"])
        conn.execute("SELECT pg_sleep(0.1)")
        return "first"

    with Database(Settings(dsn=app_dsn, max_size=16)) as database, ThreadPoolExecutor(16) as threads:

        def work(_: int) -> str:
            barrier.wait()
            with as_service("burst"):
                return database.execute_write(operation, idempotency_key=key)

        assert list(threads.map(work, range(16))) == ["first"] * 16
    assert len(runs) == 1
    assert rows(owner_dsn, "burst") == 1


def test_a_failed_write_leaves_its_key_free(database: Database, owner_dsn: str) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        database.execute_write("SELECT 1 / 0", idempotency_key="free")
    with pytest.raises(KeyError):
        database.execute_write(lambda conn: {}["x"], idempotency_key="free")
    assert database.execute_write(ADD, ["free"], idempotency_key="free") == 1
    assert rows(owner_dsn, "free") == 1


def test_a_lost_reply_of_a_keyed_write_returns_the_kept_result(
    proxy: TcpProxy, database: Database, listener: Listener, owner_dsn: str
) -> None:
    runs: list[int] = []

    def operation(conn: Connection[Any]) -> str:
        runs.append(1)
        conn.execute(ADD, ["lost"])
        return "kept"

    proxy.cut_reply_to(b"COMMIT")
    assert database.execute_write(operation, idempotency_key="lost") == "kept"
    assert len(runs) == 1
    assert [event.outcome for event in listener.of(CommitResolved)] == ["committed"]
    assert listener.of(Retried) == []
    assert [event.error for event in listener.of(OperationEnded)] == [None]
    assert rows(owner_dsn, "lost") == 1


def test_a_key_belongs_to_its_actor_and_its_operation(database: Database) -> None:
    assert database.execute_write("SELECT 1", idempotency_key="mine", name="settle") == [(1,)]
    with pytest.raises(ConfigurationError, match="another name"):
        database.execute_write("SELECT 1", idempotency_key="mine", name="refund")
    with acting_as(uuid4()), pytest.raises(ConfigurationError, match="another actor"):
        database.execute_write("SELECT 1", idempotency_key="mine")


def test_a_result_that_cannot_be_kept_is_returned_once(database: Database) -> None:
    marker = object()
    assert database.execute_write(lambda conn: marker, idempotency_key="opaque") is marker
    with pytest.raises(ResultLostError, match="could not be kept"):
        database.execute_write(lambda conn: marker, idempotency_key="opaque")


@pytest.mark.parametrize("key", ["", "x" * 256, "auto:mine", "nul\x00", 7])
def test_a_key_that_is_none_is_refused(database: Database, key: Any) -> None:
    with pytest.raises(ConfigurationError, match="idempotency_key"):
        database.execute_write("SELECT 1", idempotency_key=key)


def test_keys_are_purged_when_their_retention_is_over(database: Database, owner_dsn: str) -> None:
    set_distance(database, 0.001)
    database.execute_write("SELECT 1", idempotency_key="old")
    database.execute_write("SELECT 1")
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("UPDATE equitie_private.idempotency_keys SET created_at = now() - interval '2 hours'")
    purge = "SELECT equitie_private.purge_idempotency_keys(%s::interval, interval '1 hour')"
    assert database.execute_write(purge, ["7 days"]) == [(1,)]
    assert database.execute_write(purge, ["1 hour"]) == [(1,)]
