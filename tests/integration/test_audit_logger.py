"""The audit log as the application writes and reads it, on a real server."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from equitie_data import AuditAction, CommitOutcomeUnknown, acting_as, as_service
from equitie_data.audit import AuditLogger
from equitie_data.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from equitie_data import Database

ADD_COMPANY = "INSERT INTO public.companies_clean (company_name) VALUES (%s)"


@pytest.fixture
def owner(owner_dsn: str, database: Database) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    with psycopg.connect(owner_dsn, autocommit=True, row_factory=dict_row) as connection:
        yield connection


@pytest.fixture
def person(owner: psycopg.Connection[Any]) -> Callable[[str], UUID]:
    def add(role: str) -> UUID:
        user_id = uuid4()
        owner.execute(
            "INSERT INTO public.user_profiles (user_id, email, role) VALUES (%s, %s, %s)",
            [user_id, f"{user_id}@example.com", role],
        )
        return user_id

    return add


def stored(owner: psycopg.Connection[dict[str, Any]]) -> list[dict[str, Any]]:
    return owner.execute("SELECT * FROM public.audit_logs WHERE source = 'sdk' ORDER BY audit_id").fetchall()


def test_queued_events_are_stored_with_their_own_actors(
    database: Database, owner: psycopg.Connection[Any], person: Callable[[str], UUID]
) -> None:
    user_id = person("investor")
    with acting_as(user_id, ip_address="2001:db8::1", user_agent="web", session_id="s", request_id="r", tenant_id="t"):
        database.audit.log(AuditAction.READ, "investor", 7, metadata={"fields": ["iban"], "iban": "GB82WEST"})
    with as_service("nightly"):
        database.audit.log("EXPORT", "report", changes={"before": {"a": 1}, "after": {"a": 2}})
    database.audit.flush()
    read, export = stored(owner)
    assert (read["actor_type"], read["user_id"], read["action"], read["entity_id"]) == ("user", user_id, "READ", "7")
    assert (str(read["ip_address"]), read["user_agent"], read["session_id"]) == ("2001:db8::1", "web", "s")
    assert (read["request_id"], read["tenant_id"]) == ("r", "t")
    assert read["metadata"]["iban"] == "***"
    assert (export["actor_type"], export["user_id"], export["reason"]) == ("service", None, "nightly")
    assert export["changes"] == {"before": {"a": 1}, "after": {"a": 2}}


def test_events_of_a_write_commit_and_roll_back_with_it(
    database: Database, owner: psycopg.Connection[Any], person: Callable[[str], UUID]
) -> None:
    def approve(connection: psycopg.Connection[Any], name: str, *, fail: bool) -> None:
        database.audit.log(AuditAction.APPROVE, "company", name)
        connection.execute(ADD_COMPANY, [name])
        if fail:
            raise LookupError

    with acting_as(person("admin"), request_id="r1"):
        database.execute_write(lambda connection: approve(connection, "Kept", fail=False))
        with pytest.raises(LookupError):
            database.execute_write(lambda connection: approve(connection, "Lost", fail=True))
    database.audit.flush()
    [event] = stored(owner)
    [change] = owner.execute(
        "SELECT * FROM public.audit_logs WHERE source = 'trigger' AND entity_type = 'companies_clean'"
    ).fetchall()
    assert event["entity_id"] == "Kept"
    assert event["transaction_xid"] == change["transaction_xid"]
    assert event["request_id"] == change["request_id"] == "r1"
    assert event["user_id"] == change["user_id"]


def test_an_operation_that_only_logs_commits(database: Database, owner: psycopg.Connection[Any]) -> None:
    with as_service("test"):
        database.execute_write(lambda _: database.audit.log("LOGIN", "session", 1))
    assert [event["action"] for event in stored(owner)] == ["LOGIN"]


def test_a_savepoint_that_is_rolled_back_takes_its_events_along(
    database: Database, owner: psycopg.Connection[Any]
) -> None:
    def work(connection: psycopg.Connection[Any]) -> None:
        database.audit.log("APPROVE", "deal", "before")
        with suppress(LookupError), connection.transaction():
            database.audit.log("APPROVE", "deal", "undone")
            raise LookupError
        with connection.transaction():
            database.audit.log("APPROVE", "deal", "released")
        database.audit.log("APPROVE", "deal", "after")

    with as_service("test"):
        database.execute_write(work)
    assert {event["entity_id"] for event in stored(owner)} == {"before", "released", "after"}


def test_a_retried_attempt_leaves_the_events_of_the_last_one_only(
    database: Database, owner: psycopg.Connection[Any]
) -> None:
    attempts = []

    def work(connection: psycopg.Connection[Any]) -> None:
        attempts.append(1)
        for number in range(150):
            database.audit.log("IMPORT", f"attempt {len(attempts)}", number)
        if len(attempts) == 1:
            connection.execute("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")

    with as_service("test"):
        database.execute_write(work)
    events = stored(owner)
    assert len(attempts) == 2
    assert {event["entity_type"] for event in events} == {"attempt 2"}
    assert [event["entity_id"] for event in events] == [str(number) for number in range(150)]


def test_an_event_the_table_refuses_fails_the_whole_write(database: Database, owner: psycopg.Connection[Any]) -> None:
    owner.execute("ALTER TABLE public.audit_logs ADD CONSTRAINT no_bad CHECK (entity_type <> 'bad') NOT VALID")

    def work(connection: psycopg.Connection[Any]) -> None:
        connection.execute(ADD_COMPANY, ["Gone"])
        database.audit.log("APPROVE", "bad", 1)

    with as_service("test"), pytest.raises(psycopg.errors.CheckViolation):
        database.execute_write(work)
    assert owner.execute("SELECT FROM public.companies_clean").fetchall() == []
    with as_service("test"):
        for number in range(5):
            database.audit.log("READ", "bad" if number == 3 else "deal", number)
    database.audit.flush()
    assert [event["entity_id"] for event in stored(owner)] == ["0", "1", "2", "4"]
    assert database.audit.stats().dropped == 1


def test_a_user_cannot_log_as_somebody_else_within_their_own_write(
    database: Database, owner: psycopg.Connection[Any], person: Callable[[str], UUID]
) -> None:
    user_id, other = person("investor"), person("investor")

    def work(_: psycopg.Connection[Any]) -> None:
        with acting_as(other):
            database.audit.log("APPROVE", "deal", 1)

    with acting_as(user_id):
        database.execute_write(work)
    assert [event["user_id"] for event in stored(owner)] == [user_id]


def test_a_commit_whose_reply_was_lost_is_not_stored_twice(database: Database, owner: psycopg.Connection[Any]) -> None:
    lost = [True]

    def execute_write(*args: Any, **options: Any) -> Any:
        result = database.execute_write(*args, **options)
        if lost:
            lost.pop()
            raise CommitOutcomeUnknown
        return result

    audit = AuditLogger(execute_write=execute_write, execute_read=database.execute_read)
    with as_service("test"):
        for number in range(3):
            audit.log("READ", "deal", number)
    with pytest.raises(CommitOutcomeUnknown):
        audit.flush()
    audit.flush()
    assert [event["entity_id"] for event in stored(owner)] == ["0", "1", "2"]
    assert (audit.stats().queued, audit.stats().flushed) == (0, 3)


@pytest.mark.parametrize("commits", [True, False], ids=["it commits later", "it never commits"])
def test_the_second_attempt_waits_for_a_first_one_still_on_its_way(
    database: Database, owner: psycopg.Connection[Any], owner_dsn: str, commits: bool
) -> None:
    with psycopg.connect(owner_dsn) as slow:

        def execute_write(operation: Callable[[Any], Any], **options: Any) -> Any:
            if slow.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                return database.execute_write(operation, **options)
            operation(slow)  # its COMMIT is stuck somewhere
            raise CommitOutcomeUnknown

        audit = AuditLogger(execute_write=execute_write, execute_read=database.execute_read)
        with as_service("test"):
            audit.log("READ", "deal", 1)
        with pytest.raises(CommitOutcomeUnknown):
            audit.flush()
        again = threading.Thread(target=audit.flush)
        again.start()
        waiting = "SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while not owner.execute(waiting).fetchall():
            assert again.is_alive()
        if commits:
            slow.commit()
        else:
            slow.rollback()
        again.join()
    assert [event["entity_id"] for event in stored(owner)] == ["1"]


def test_only_those_who_may_audit_read_the_log(database: Database, person: Callable[[str], UUID]) -> None:
    with as_service("test"):
        database.audit.log("READ", "deal", 1)
    database.audit.flush()
    for role, seen in [("superadmin", 1), ("admin", 1), ("auditor", 1), ("manager", 0)]:
        with acting_as(person(role)):
            assert len(database.audit.query(source="sdk")) == seen, role
    for role in ("investor", "viewer"):
        with acting_as(person(role)), pytest.raises(psycopg.errors.InsufficientPrivilege):
            database.audit.query()
    with as_service("test"):
        assert len(database.audit.query(source="sdk")) == 1


def test_query_filters_and_pages(database: Database, person: Callable[[str], UUID]) -> None:
    user_id = person("investor")
    with acting_as(user_id, request_id="r1"):
        for number in range(25):
            database.audit.log("READ", "deal", number, metadata={"n": number})
    with as_service("test"):
        database.audit.log("EXPORT", "report", "x")
        database.audit.flush()
        audit = database.audit
        [export] = audit.query(action=AuditAction.EXPORT)
        assert (export.entity_type, export.actor_type, export.action == AuditAction.EXPORT) == (
            "report",
            "service",
            True,
        )
        pages, before_id = [], None
        while page := audit.query(user_id=user_id, source="sdk", limit=10, before_id=before_id):
            pages.append(page)
            before_id = page[-1].audit_id
        assert [len(page) for page in pages] == [10, 10, 5]
        records = [record for page in pages for record in page]
        assert [record.entity_id for record in records] == [str(number) for number in reversed(range(25))]
        assert [record.metadata for record in records] == [{"n": number} for number in reversed(range(25))]
        assert len({record.event_id for record in records}) == 25
        assert [r.entity_id for r in audit.query(entity_type="deal", entity_id=3)] == ["3"]
        assert len(audit.query(request_id="r1", source="sdk")) == 25
        middle = records[10].timestamp
        assert len(audit.query(request_id="r1", source="sdk", since=middle)) == 11
        assert len(audit.query(request_id="r1", source="sdk", until=middle)) == 14
        assert audit.query(entity_id="'; drop table x; --") == []


def test_changes_keep_their_keys(database: Database, person: Callable[[str], UUID]) -> None:
    with as_service("test"):
        database.audit.log_change("deal", 1, {"a": 1, "b": "x"}, {"a": 2, "b": "x", "c": None})
        database.audit.flush()
        [record] = database.audit.query(source="sdk")
    assert record.changes == {"before": {"a": 1}, "after": {"a": 2, "c": None}}


def test_text_no_jsonb_takes_does_not_cost_the_batch(database: Database, owner: psycopg.Connection[Any]) -> None:
    with as_service("test"):
        database.audit.log("READ", "deal", 1, metadata={"note": "a\x00b\ud800", "n": float("nan")})
        database.audit.log("READ", "deal", 2)
    database.audit.flush()
    assert len(stored(owner)) == 2


def test_an_outage_keeps_the_events_until_it_is_over(database: Database, owner: psycopg.Connection[Any]) -> None:
    with as_service("test"):
        database.audit.log("READ", "deal", 1)
    owner.execute("ALTER FUNCTION equitie_private.record_audit_events(jsonb) RENAME TO away")
    with pytest.raises(psycopg.errors.UndefinedFunction):
        database.audit.flush()
    assert database.audit.stats().queued == 1
    owner.execute("ALTER FUNCTION equitie_private.away(jsonb) RENAME TO record_audit_events")
    database.audit.flush()
    assert len(stored(owner)) == 1


def test_closing_the_database_writes_what_is_queued(database: Database, owner: psycopg.Connection[Any]) -> None:
    with as_service("test"):
        database.audit.log("LOGOUT", "session", 1)
    database.close()
    assert [event["action"] for event in stored(owner)] == ["LOGOUT"]


def test_a_flush_keeps_to_its_time(database: Database, owner: psycopg.Connection[Any]) -> None:
    with as_service("test"):
        database.audit.log("READ", "deal", 1)
    with owner.transaction():
        owner.execute("LOCK TABLE public.audit_logs IN ACCESS EXCLUSIVE MODE")
        with pytest.raises((UnavailableError, psycopg.errors.QueryCanceled)):
            database.audit.flush(timeout=0.2)
    database.audit.flush()
    assert len(stored(owner)) == 1


def test_sixteen_threads_log_exactly(database: Database, owner: psycopg.Connection[Any]) -> None:
    users = [uuid4() for _ in range(16)]

    def work(user_id: UUID) -> None:
        with acting_as(user_id):
            for number in range(100):
                database.audit.log("READ", "deal", number)

    threads = [threading.Thread(target=work, args=(user_id,)) for user_id in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.audit.flush()
    counted = owner.execute(
        "SELECT user_id, count(*) AS n, count(DISTINCT entity_id) AS d FROM public.audit_logs GROUP BY user_id"
    ).fetchall()
    assert {(row["user_id"], row["n"], row["d"]) for row in counted} == {(user_id, 100, 100) for user_id in users}
