from __future__ import annotations

import asyncio
import os
import threading
from contextlib import contextmanager
from datetime import datetime, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from equitie_data import context
from equitie_data.audit import AuditAction, AuditLogger, AuditRecord
from equitie_data.context import acting_as, as_service
from equitie_data.errors import CommitOutcomeUnknown, NoActorError, NotOpenError, UnavailableError
from equitie_data.redaction import MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USER = UUID("0ff1ce00-0000-4000-8000-000000000001")


class FakeCursor:
    """Finds which of the events it is asked about are in the log."""

    def __init__(self, log: FakeLog) -> None:
        self.log = log
        self.found: list[tuple[str]] = []

    def execute(self, _sql: str, params: list[Any]) -> None:
        in_log = {event_id(event) for event in self.log.events}
        self.found = [(each,) for each in params[2] if each in in_log]

    def __iter__(self) -> Iterator[tuple[str]]:
        return iter(self.found)


class FakeConnection:
    """Records what is sent to it."""

    def __init__(self, log: FakeLog) -> None:
        self.log = log
        self.sent: list[dict[str, Any]] = []
        self.locked: list[int] = []
        self.looked_up = False
        self.error: Exception | None = None
        self._num_transactions = 0

    def execute(self, sql: str, params: list[Any]) -> None:
        if self.error is not None:
            raise self.error
        if "pg_advisory_xact_lock" in sql:
            self.locked.append(params[0])
        if "record_audit_events" in sql:
            self.sent += params[-1].obj

    @contextmanager
    def cursor(self, **_: object) -> Iterator[FakeCursor]:
        self.looked_up = True
        yield FakeCursor(self.log)


class FakeLog:
    """Stands for the database: what was committed, and errors to come."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.errors: list[BaseException | Callable[[list[dict[str, Any]]], BaseException | None]] = []
        self.batches: list[int] = []
        self.connections: list[FakeConnection] = []
        self.actors: list[context.Actor] = []
        self.lose_reply = False
        self.lock = threading.Lock()

    def execute_write(self, operation: Any, **_: object) -> None:
        with self.lock:
            self.actors.append(context.current_actor())
            connection = FakeConnection(self)
            self.connections.append(connection)
            operation(connection)
            if self.errors:
                error = self.errors[0]
                if callable(error):
                    raised = error(connection.sent)
                    if raised is not None:
                        raise raised
                else:
                    self.errors.pop(0)
                    if isinstance(error, CommitOutcomeUnknown) and self.lose_reply:
                        self.events += connection.sent
                    raise error
            self.events += connection.sent
            self.batches.append(len(connection.sent))

    def execute_read(self, *args: object, **kwargs: object) -> list[Any]:
        raise AssertionError


class FakeTransaction:
    def __init__(self, connection: FakeConnection) -> None:
        self.connection = connection
        self.local: dict[Any, Any] = {}
        self.actions: list[Callable[[Any], None]] = []

    def before_commit(self, action: Callable[[Any], None]) -> None:
        self.actions.append(action)


@contextmanager
def transaction(log: FakeLog) -> Iterator[FakeTransaction]:
    """A write as the pool runs one: its actions before the commit, nothing stored if anything raises."""
    running = FakeTransaction(FakeConnection(log))
    token = context.transaction_variable.set(running)  # type: ignore[arg-type]
    try:
        yield running
        for action in running.actions:
            action(running.connection)
        log.events += running.connection.sent
    finally:
        context.transaction_variable.reset(token)


def event_id(event: dict[str, Any]) -> str:
    return str(event["metadata"]["equitie_event_id"])


def ids(events: list[dict[str, Any]]) -> list[str | None]:
    return [event["entity_id"] for event in events]


@pytest.fixture
def log() -> FakeLog:
    return FakeLog()


def logger_on(log: FakeLog, **options: Any) -> AuditLogger:
    return AuditLogger(execute_write=log.execute_write, execute_read=log.execute_read, **options)


@pytest.fixture
def audit(log: FakeLog) -> AuditLogger:
    return logger_on(log)


@pytest.fixture
def user() -> Iterator[None]:
    with acting_as(USER, ip_address="203.0.113.9", request_id="r1", tenant_id="t1"):
        yield


def test_an_event_carries_who_what_and_when(log: FakeLog, audit: AuditLogger, user: None) -> None:
    before = datetime.now(timezone.utc)
    audit.log(
        AuditAction.EXPORT, "investor", 7, metadata={"format": "csv", "api_key": "k"}, changes={"a": Decimal("1.5")}
    )
    audit.flush()
    [event] = log.events
    assert event["action"] == "EXPORT"
    assert (event["entity_type"], event["entity_id"]) == ("investor", "7")
    assert event["user_id"] == str(USER)
    assert (event["ip_address"], event["request_id"], event["tenant_id"]) == ("203.0.113.9", "r1", "t1")
    assert event["metadata"].pop("equitie_event_id")
    assert event["metadata"] == {"format": "csv", "api_key": MASK}
    assert event["changes"] == {"a": "1.5"}
    assert before <= datetime.fromisoformat(event["timestamp"]) <= datetime.now(timezone.utc)


def test_the_actor_is_the_one_at_the_call_not_at_the_flush(log: FakeLog, audit: AuditLogger) -> None:
    other = uuid4()
    with acting_as(USER):
        audit.log("READ", "deal", 1)
    with acting_as(other):
        audit.log("READ", "deal", 2)
    with as_service("nightly"):
        audit.log("READ", "deal", 3)
        audit.flush()
    assert [event["user_id"] for event in log.events] == [str(USER), str(other), None]
    assert [event["reason"] for event in log.events] == [None, None, "nightly"]
    assert [actor.reason for actor in log.actors] == ["audit log"]


def test_without_an_actor_nothing_is_logged(log: FakeLog, audit: AuditLogger) -> None:
    with pytest.raises(NoActorError):
        audit.log("READ", "deal", 1)
    assert audit.stats().queued == 0


@pytest.mark.parametrize(
    ("action", "entity_type", "entity_id"),
    [("PEEK", "deal", 1), ("READ", "", 1), ("READ", "x" * 129, 1), ("READ", "deal", "x" * 513), ("READ", "a\x00", 1)],
)
def test_an_event_the_table_would_refuse_is_refused_at_once(
    audit: AuditLogger, user: None, action: str, entity_type: str, entity_id: Any
) -> None:
    with pytest.raises(ValueError, match=r"audit event|AuditAction"):
        audit.log(action, entity_type, entity_id)


def test_batches_hold_a_hundred(log: FakeLog, audit: AuditLogger, user: None) -> None:
    for number in range(250):
        audit.log("READ", "deal", number)
    assert log.batches == []
    audit.flush()
    assert log.batches == [100, 100, 50]
    assert ids(log.events) == [str(number) for number in range(250)]
    assert audit.stats().flushed == 250
    assert audit.stats().queued == 0


def test_the_thread_writes_a_full_batch_at_once(log: FakeLog, user: None) -> None:
    audit = logger_on(log, flush_interval=3600.0)
    audit.start()
    for number in range(100):
        audit.log("READ", "deal", number)
    wait_until(lambda: len(log.events) == 100)
    audit.close()


def test_the_thread_writes_a_lonely_event_when_the_interval_is_over(log: FakeLog, user: None) -> None:
    audit = logger_on(log, flush_interval=0.01)
    audit.start()
    audit.log("READ", "deal", 1)
    wait_until(lambda: len(log.events) == 1)
    audit.close()


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


def test_no_thread_starts_before_start(audit: AuditLogger, user: None) -> None:
    before = threading.active_count()
    for _ in range(150):
        audit.log("READ", "deal", 1)
    assert threading.active_count() == before


def test_a_full_queue_writes_in_the_callers_time(log: FakeLog, user: None) -> None:
    audit = logger_on(log, batch_size=10, capacity=20)
    for number in range(25):
        audit.log("READ", "deal", number)
    assert log.batches == [10]
    assert audit.stats().queued == 15
    audit.close()
    assert ids(log.events) == [str(number) for number in range(25)]


def test_a_full_queue_that_cannot_be_written_raises_and_keeps_everything(log: FakeLog, user: None) -> None:
    audit = logger_on(log, batch_size=10, capacity=20)
    log.errors = [lambda _: UnavailableError("away")]
    for number in range(20):
        audit.log("READ", "deal", number)
    with pytest.raises(UnavailableError):
        audit.log("READ", "deal", 20)
    assert audit.stats().queued == 20
    assert audit.stats().failed_flushes == 1
    log.errors = []
    audit.log("READ", "deal", 21)
    audit.flush()
    assert ids(log.events) == [str(number) for number in range(20)] + ["21"]
    assert audit.stats().dropped == 0


def test_a_failed_batch_is_kept_and_goes_first(log: FakeLog, audit: AuditLogger, user: None) -> None:
    audit.log("READ", "deal", 1)
    log.errors = [UnavailableError("away")]
    with pytest.raises(UnavailableError):
        audit.flush()
    assert audit.stats().queued == 1
    assert audit.stats().oldest_queued_seconds > 0
    audit.log("READ", "deal", 2)
    audit.flush()
    assert ids(log.events) == ["1", "2"]
    assert not any(connection.looked_up for connection in log.connections)


@pytest.mark.parametrize("arrived", [True, False], ids=["it was committed", "it was not"])
def test_a_batch_of_unknown_outcome_is_stored_once(log: FakeLog, audit: AuditLogger, user: None, arrived: bool) -> None:
    log.lose_reply = arrived
    log.errors = [CommitOutcomeUnknown("lost"), UnavailableError("still away")]
    for number in range(3):
        audit.log("READ", "deal", number)
    with pytest.raises(CommitOutcomeUnknown):
        audit.flush()
    with pytest.raises(UnavailableError):
        audit.flush()
    audit.log("READ", "deal", 3)
    audit.flush()
    assert ids(log.events) == ["0", "1", "2", "3"]
    # The lock is what makes the second attempt wait for the first to end: the same one, taken by both.
    first, second, third, _ = log.connections
    assert first.locked[0] == second.locked[0] == third.locked[0]
    assert third.looked_up


def test_an_interrupt_leaves_the_outcome_unknown_too(log: FakeLog, audit: AuditLogger, user: None) -> None:
    log.errors = [KeyboardInterrupt()]
    audit.log("READ", "deal", 1)
    with pytest.raises(KeyboardInterrupt):
        audit.flush()
    log.events += log.connections[0].sent  # it had arrived
    audit.flush()
    assert ids(log.events) == ["1"]


def test_one_event_the_server_refuses_does_not_hold_up_the_others(log: FakeLog, audit: AuditLogger, user: None) -> None:
    def refuse(sent: list[dict[str, Any]]) -> BaseException | None:
        return psycopg.errors.CheckViolation("no") if "13" in ids(sent) else None

    log.errors = [refuse]
    for number in range(30):
        audit.log("READ", "deal", number)
    with structlog.testing.capture_logs() as logged:
        audit.flush()
    assert ids(log.events) == [str(number) for number in range(30) if number != 13]
    assert audit.stats().dropped == 1
    assert [entry["event"] for entry in logged] == ["audit.event_refused"]


def test_the_thread_survives_failures(log: FakeLog, user: None) -> None:
    audit = logger_on(log, flush_interval=0.001)
    log.errors = [UnavailableError("away"), ValueError("odd"), UnavailableError("away")]
    with structlog.testing.capture_logs() as logged:
        audit.start()
        audit.log("READ", "deal", 1)
        wait_until(lambda: len(log.events) == 1)
    assert audit.stats().failed_flushes == 3
    assert {entry["event"] for entry in logged} == {"audit.flush_failed"}
    audit.close()


def test_sixteen_threads_lose_and_double_nothing(log: FakeLog) -> None:
    audit = logger_on(log, batch_size=7, capacity=50, flush_interval=0.001)
    audit.start()
    users = [uuid4() for _ in range(16)]

    def work(user_id: UUID) -> None:
        with acting_as(user_id):
            for number in range(200):
                audit.log("READ", str(user_id), number)

    threads = [threading.Thread(target=work, args=(user_id,)) for user_id in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    assert audit.stats().flushed == len(log.events) == 3200
    assert len({event_id(event) for event in log.events}) == 3200
    for user_id in users:
        mine = [event for event in log.events if event["entity_type"] == str(user_id)]
        assert ids(mine) == [str(number) for number in range(200)]
        assert {event["user_id"] for event in mine} == {str(user_id)}


def test_close_writes_what_is_queued_and_ends_the_thread(log: FakeLog, audit: AuditLogger, user: None) -> None:
    audit.start()
    thread = audit._queue._thread
    audit.log("LOGOUT", "session", "s")
    audit.close()
    audit.close()
    assert ids(log.events) == ["s"]
    assert thread is not None
    assert not thread.is_alive()
    with pytest.raises(NotOpenError):
        audit.log("READ", "deal", 1)
    audit.start()
    audit.log("READ", "deal", 1)
    audit.close()
    assert ids(log.events) == ["s", "1"]


def test_close_that_cannot_write_says_so_and_keeps_the_events(log: FakeLog, audit: AuditLogger, user: None) -> None:
    audit.log("READ", "deal", 1)
    log.errors = [UnavailableError("away")]
    with pytest.raises(UnavailableError):
        audit.close()
    assert audit.stats().queued == 1
    audit.close()
    assert ids(log.events) == ["1"]


def test_close_gives_up_at_its_deadline(user: None) -> None:
    release, entered = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        entered.set()
        release.wait()

    audit = AuditLogger(execute_write=hang, execute_read=hang, flush_interval=0.001)
    audit.start()
    audit.log("READ", "deal", 1)
    entered.wait()
    with pytest.raises(UnavailableError, match="1 events are still queued"):
        audit.close(timeout=0.01)
    release.set()


def test_a_forked_child_starts_empty_and_with_a_thread_of_its_own(log: FakeLog, user: None) -> None:
    audit = logger_on(log, flush_interval=3600.0)
    audit.start()
    audit.log("READ", "deal", "parent")
    stop, wake = audit._queue._stop, audit._queue._wake
    audit.after_fork()
    stop.set()  # a real fork would not have brought the parent's thread along
    wake.set()
    assert audit.stats().queued == 0
    for number in range(100):
        audit.log("READ", "deal", number)
    wait_until(lambda: len(log.events) == 100)
    audit.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # threads and fork, which is what this is about
def test_a_real_fork_hangs_on_no_lock(log: FakeLog, user: None) -> None:
    audit = logger_on(log)
    audit.start()
    with audit._queue._lock, audit._queue._flush_lock:  # another thread holds them at the moment of the fork
        child = os.fork()
        if child == 0:
            status = 1
            try:
                audit.after_fork()
                audit.log("READ", "deal", "child")
                audit.flush()
                status = 0 if ids(log.events) == ["child"] else 2
            finally:
                os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    audit.close()


# --- with a transaction


def test_events_of_a_transaction_go_with_it(log: FakeLog, audit: AuditLogger, user: None) -> None:
    with transaction(log) as running:
        audit.log("APPROVE", "deal", 1)
        assert running.connection.sent == []
    assert ids(log.events) == ["1"]
    assert log.batches == []
    assert audit.stats().queued == 0
    assert audit.stats().sent_in_transactions == 1


def test_a_rollback_drops_them(log: FakeLog, audit: AuditLogger, user: None) -> None:
    def approve(*, fail: bool) -> None:
        with transaction(log):
            audit.log("APPROVE", "deal", int(fail))
            if fail:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        approve(fail=True)
    approve(fail=False)
    audit.flush()
    assert ids(log.events) == ["0"]


def test_within_a_transaction_batches_hold_a_hundred_too(log: FakeLog, audit: AuditLogger, user: None) -> None:
    with transaction(log) as running:
        for number in range(130):
            audit.log("IMPORT", "deal", number)
        assert len(running.connection.sent) == 100
        audit.flush()
        assert len(running.connection.sent) == 130
    assert ids(log.events) == [str(number) for number in range(130)]


def test_an_event_inside_a_savepoint_is_written_inside_it(log: FakeLog, audit: AuditLogger, user: None) -> None:
    with transaction(log) as running:
        audit.log("APPROVE", "deal", "outside")
        running.connection._num_transactions = 1
        audit.log("APPROVE", "deal", "inside")
        assert ids(running.connection.sent) == ["inside"]
        running.connection._num_transactions = 0
    assert sorted(ids(log.events), key=str) == ["inside", "outside"]


def test_events_that_cannot_be_written_fail_the_commit(log: FakeLog, audit: AuditLogger, user: None) -> None:
    def approve() -> None:
        with transaction(log) as running:
            audit.log("APPROVE", "deal", 1)
            running.connection.error = psycopg.errors.InsufficientPrivilege()

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        approve()
    assert log.events == []


# --- changes

_states = st.dictionaries(st.sampled_from("abcdef"), st.none() | st.integers(0, 3) | st.floats() | st.text(max_size=2))


@given(_states, _states)
def test_a_change_holds_exactly_the_keys_that_differ(before: dict[str, Any], after: dict[str, Any]) -> None:
    log = FakeLog()
    audit = logger_on(log)
    differing = {
        key
        for key in {*before, *after}
        if (key in before) != (key in after)
        or not (before[key] == after[key] or (before[key] != before[key] and after[key] != after[key]))
    }
    with acting_as(USER):
        assert audit.log_change("deal", 1, before, after) is bool(differing)
    audit.flush()
    assert len(log.events) == bool(differing)
    for event in log.events:
        assert event["action"] == "UPDATE"
        assert set(event["changes"]["before"]) == differing & set(before)
        assert set(event["changes"]["after"]) == differing & set(after)


def test_a_changed_secret_is_seen_and_masked(log: FakeLog, audit: AuditLogger, user: None) -> None:
    audit.log_change("user", 1, {"password": "a", "x": 1}, {"password": "b", "x": 1})
    audit.flush()
    assert log.events[0]["changes"] == {"before": {"password": MASK}, "after": {"password": MASK}}


def test_creation_and_deletion_have_one_side(log: FakeLog, audit: AuditLogger, user: None) -> None:
    audit.log_change("deal", 1, None, {"a": 1}, action=AuditAction.CREATE)
    audit.log_change("deal", 1, {"a": 1}, None, action=AuditAction.DELETE)
    audit.flush()
    assert [event["changes"] for event in log.events] == [
        {"before": {}, "after": {"a": 1}},
        {"before": {"a": 1}, "after": {}},
    ]


def test_values_without_a_plain_equality_count_as_changed(log: FakeLog, audit: AuditLogger, user: None) -> None:
    class Vector:
        def __eq__(self, other: object) -> Any:
            raise ValueError("ambiguous")

        __hash__ = None  # type: ignore[assignment]

    vector = Vector()
    assert not audit.log_change("deal", 1, {"v": vector}, {"v": vector})
    assert audit.log_change("deal", 1, {"v": vector}, {"v": Vector()})
    assert not audit.log_change("deal", 1, {"v": Decimal("1.0")}, {"v": Decimal("1.00")})


# --- decorator


def test_a_decorated_function_is_audited_after_success(log: FakeLog, audit: AuditLogger, user: None) -> None:
    @audit.with_audit(AuditAction.APPROVE, "deal", entity_id=lambda deal_id: deal_id)
    def approve(deal_id: int) -> str:
        assert audit.stats().queued == 0
        return f"approved {deal_id}"

    assert approve(7) == "approved 7"
    audit.flush()
    assert [(event["action"], event["entity_id"]) for event in log.events] == [("APPROVE", "7")]


def test_a_decorated_function_that_fails_is_audited_past_the_rollback(
    log: FakeLog, audit: AuditLogger, user: None
) -> None:
    @audit.with_audit("APPROVE", "deal")
    def approve() -> None:
        raise LookupError("deal 4711 of Mr. Secret")

    with pytest.raises(LookupError), transaction(log):
        approve()
    audit.flush()
    [event] = log.events
    event["metadata"].pop("equitie_event_id")
    assert event["metadata"] == {"outcome": "failed", "error": "LookupError"}


def test_a_decorated_function_does_not_run_as_nobody(audit: AuditLogger) -> None:
    @audit.with_audit("APPROVE", "deal")
    def approve() -> None:
        pytest.fail("it ran")

    with pytest.raises(NoActorError):
        approve()


def test_a_decorated_coroutine_is_audited_when_it_is_done(log: FakeLog, audit: AuditLogger, user: None) -> None:
    @audit.with_audit("EXPORT", "deal", entity_id=lambda *, fail: int(fail))
    async def export(*, fail: bool) -> int:
        await asyncio.sleep(0)
        if fail:
            raise OSError
        return 3

    assert asyncio.run(export(fail=False)) == 3
    with pytest.raises(OSError):
        asyncio.run(export(fail=True))
    audit.flush()
    assert ids(log.events) == ["0", "1"]
    assert log.events[1]["metadata"]["error"] == "OSError"


def test_set_context_is_bound_to_the_context_not_the_process(log: FakeLog, audit: AuditLogger) -> None:
    users = [uuid4() for _ in range(8)]
    barrier = threading.Barrier(len(users))

    def request(user_id: UUID) -> None:
        audit.set_context(user_id=user_id, ip_address="203.0.113.9")
        barrier.wait()
        audit.log("READ", "deal", str(user_id))

    threads = [threading.Thread(target=request, args=(user_id,)) for user_id in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.flush()
    assert len(log.events) == len(users)
    assert all(event["user_id"] == event["entity_id"] for event in log.events)
    with pytest.raises(NoActorError):
        audit.log("READ", "deal", 1)


# --- reading


def test_query_composes_its_filters_and_reads_records() -> None:
    asked: dict[str, Any] = {}
    when = datetime(2026, 1, 2, tzinfo=timezone.utc)
    identity = uuid4()
    row = [9, when, "sdk", "user", USER, "t", "READ", "deal", "7", None, {"equitie_event_id": str(identity), "a": 1}]
    row += ["203.0.113.9", "ua", "s", "r", None, "app", 77]

    def execute_read(sql: str, params: list[Any], **options: Any) -> list[Any]:
        asked.update(sql=sql, params=params, **options)
        return [tuple(row)]

    audit = AuditLogger(execute_write=execute_read, execute_read=execute_read)
    [record] = audit.query(user_id=USER, action=AuditAction.READ, entity_id=7, since=when, before_id=10, limit=5)
    assert isinstance(record, AuditRecord)
    assert (record.event_id, record.metadata, record.transaction_xid) == (identity, {"a": 1}, 77)
    assert asked["params"] == [str(USER), "READ", "7", when, 10, 5]
    assert asked["sql"].count("%s") == 6
    assert "ORDER BY audit_id DESC" in asked["sql"]
    audit.query()
    assert "WHERE" not in asked["sql"]
    with pytest.raises(ValueError, match="limit"):
        audit.query(limit=0)


def test_query_raises_what_the_database_raised() -> None:
    def fail(*_: object, **__: object) -> None:
        raise psycopg.errors.InsufficientPrivilege

    audit = AuditLogger(execute_write=fail, execute_read=fail)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        audit.query()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"capacity": 99}, {"flush_interval": 0.0}])
def test_sizes_that_cannot_work_are_refused(log: FakeLog, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="audit queue"):
        logger_on(log, **options)
