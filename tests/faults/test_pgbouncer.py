"""Behind PgBouncer in transaction mode: every transaction may run on another server connection."""

from __future__ import annotations

import contextlib
import contextvars
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from tests.faults.application import Listener, settings, wait_until
from tests.faults.ledger import Discrepancies, Ledger, Load, Transfer
from tests.faults.pgbouncer import MISSING, PgBouncer, program

from equitie_data import Database, acting_as, as_service
from equitie_data.errors import ConfigurationError, ResultLostError, UnavailableError
from equitie_data.hooks import CommitResolved, OperationEnded, StatementEnded
from equitie_data.provision import DATABASE, provision
from equitie_data.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from equitie_data.embedded import EmbeddedServer

pytestmark = [
    pytest.mark.faults,
    pytest.mark.usefixtures("service"),
    pytest.mark.skipif(program() is None, reason=MISSING),
]

POOL = 4
WHO = "SELECT current_setting('role'), coalesce(nullif(current_setting('request.jwt.claims'), '')::jsonb ->> 'sub', '')"
# What a transaction could have left behind on a server connection.
LEFTOVERS = """
SELECT pg_backend_pid(),
       (SELECT count(*) FROM pg_prepared_statements),
       (SELECT count(*) FROM pg_cursors),
       current_setting('role'),
       coalesce(current_setting('request.jwt.claims', true), ''),
       coalesce(current_setting('equitie.context', true), ''),
       current_setting('transaction_read_only'),
       current_setting('statement_timeout'),
       current_setting('idle_in_transaction_session_timeout')
"""
NOTHING = (0, 0, "none", "", "", "off", "0", "0")

FORMS = {
    "callable": {"as_statement": False},
    "callable keyed": {"as_statement": False, "key": "key 1"},
    "statement": {"as_statement": True},
    "statement keyed": {"as_statement": True, "key": "key 2"},
}


@pytest.fixture
def pgbouncer(primary: EmbeddedServer, ledger: Ledger) -> Iterator[PgBouncer]:
    """PgBouncer before a server that is up."""
    with PgBouncer(primary, pool_size=POOL) as running:
        yield running


@pytest.fixture
def pooled_dsn(pgbouncer: PgBouncer, app_role_dsn: str) -> str:
    """The application's DSN, by way of PgBouncer."""
    return pgbouncer.dsn(app_role_dsn)


@pytest.fixture
def proxy(pooled_dsn: str) -> Iterator[TcpProxy]:
    """A link to PgBouncer, long enough for statements to go in one trip with their commit."""
    with TcpProxy(pooled_dsn, delay=0.0005) as proxy:
        yield proxy


@pytest.fixture(params=FORMS.values(), ids=list(FORMS))
def transfer(request: pytest.FixtureRequest) -> Transfer:
    """A transfer in each form, with and without a key."""
    return fresh_transfer(**request.param)


def fresh_transfer(*, as_statement: bool = False, key: str | None = None) -> Transfer:
    transfer = Transfer(1, 1, 2, 5, as_statement=as_statement)
    transfer.key = None if key is None else f"{key} of {transfer.transfer_id}"
    return transfer


def commit_of(transfer: Transfer) -> bytes:
    """What to look for in the statement that commits."""
    return b"WITH moved" if transfer.as_statement and transfer.key is None else b"COMMIT"


def on_every_server_connection(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement on each of PgBouncer's server connections, which open transactions hold apart."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(POOL):
            connection = stack.enter_context(psycopg.connect(dsn, prepare_threshold=None))
            found += connection.execute(statement).fetchall()
        return found


def assert_nothing_is_left(dsn: str) -> None:
    rows = on_every_server_connection(dsn, LEFTOVERS)
    assert len({row[0] for row in rows}) == POOL, "they were not all asked"
    assert [row[1:] for row in rows] == [NOTHING] * POOL


def backend_of(connection: Connection[Any]) -> int:
    """The server process of this transaction; the client is told another number by PgBouncer."""
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


# --- finding out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", ["", "options", "options,extra_float_digits"])
def test_a_pooler_is_found_whether_it_refuses_options_or_drops_them(
    primary: EmbeddedServer, ledger: Ledger, app_role_dsn: str, ignored: str
) -> None:
    with (
        PgBouncer(primary, ignored=ignored) as pgbouncer,
        Database(settings(pgbouncer.dsn(app_role_dsn))) as database,
    ):
        assert database.settings.pooler == "transaction"
        assert database.execute_read("SELECT current_user") == [("service_role",)]
        assert database.execute_write(lambda conn: conn.execute("SELECT current_user").fetchone()) == ("service_role",)


def test_no_pooler_is_found_where_there_is_none(ledger: Ledger, app_role_dsn: str) -> None:
    with Database(settings(app_role_dsn)) as database:
        assert database.settings.pooler == "none"


def test_a_pooler_that_was_ruled_out_is_named(pooled_dsn: str) -> None:
    with pytest.raises(UnavailableError, match="a pooler in between refuses a startup parameter"):
        Database(settings(pooled_dsn, pooler="none")).open()


def test_a_closed_database_finds_the_pooler_again(pooled_dsn: str) -> None:
    database = Database(settings(pooled_dsn))
    for _ in range(2):
        with database:
            assert database.settings.pooler == "transaction"
            assert database.execute_read("SELECT 1") == [(1,)]


def test_logins_go_by_scram_on_both_sides(primary: EmbeddedServer, pooled_dsn: str) -> None:
    with Database(settings(make_conninfo(pooled_dsn, require_auth="scram-sha-256"))) as database:
        assert database.execute_read("SELECT session_user") == [("equitie_app",)]
    verifier = "SELECT rolpassword LIKE 'SCRAM-SHA-256$%' FROM pg_authid WHERE rolname = 'equitie_app'"
    methods = "SELECT DISTINCT auth_method FROM pg_hba_file_rules WHERE type = 'host'"
    with psycopg.connect(primary.dsn()) as owner:
        assert owner.execute(verifier).fetchall() == [(True,)]
        assert owner.execute(methods).fetchall() == [("scram-sha-256",)]


def test_a_wrong_password_is_told_without_telling_it(pooled_dsn: str) -> None:
    with pytest.raises(UnavailableError, match=r"authentication failed|the password or the user is wrong") as caught:
        Database(settings(make_conninfo(pooled_dsn, password="not the secret one"))).open()
    assert "not the secret one" not in str(caught.value)


# --- who acts -----------------------------------------------------------------------------------------------------


def test_forty_threads_over_four_server_connections_are_never_taken_for_one_another(
    ledger: Ledger, pooled_dsn: str
) -> None:
    people = {uuid4(): role for role in ("authenticated", "equitie_staff", "anon") for _ in range(10)}
    for person, role in people.items():
        if role != "authenticated":
            ledger.ask(
                "INSERT INTO public.user_profiles (user_id, email, role, is_active) VALUES (%s, %s, 'analyst', %s)",
                [person, f"{person}@example.com", role == "equitie_staff"],
            )
    backends: set[int] = set()

    def in_operation(conn: Connection[Any]) -> list[Any]:
        backends.add(backend_of(conn))
        first = conn.execute(WHO).fetchall()
        time.sleep(random.uniform(0, 0.002))  # others get their turn
        assert conn.execute(WHO).fetchall() == first
        return first

    def work(seed: int) -> Counter[str]:
        rng = random.Random(seed)
        counted: Counter[str] = Counter()
        for _ in range(50):
            person = rng.choice([None, *people])
            wanted = ("service_role", "") if person is None else (people[person], str(person))
            with as_service("threads") if person is None else acting_as(person):
                ways: list[Any] = [database.execute_read, database.execute_write]
                found = rng.choice(ways)(rng.choice([WHO, in_operation]))
            counted["right" if found == [wanted] else f"{found} and not {wanted}"] += 1
        return counted

    with Database(settings(pooled_dsn, max_size=40)) as database, ThreadPoolExecutor(40) as threads:
        counted = sum(threads.map(work, range(40)), Counter())
    assert counted == {"right": 40 * 50}
    assert 1 < len(backends) <= POOL
    assert_nothing_is_left(pooled_dsn)


def test_an_identity_is_gone_where_a_transaction_failed(pooled_dsn: str) -> None:
    with Database(settings(pooled_dsn)) as database, acting_as(UUID(int=7)):
        for _ in range(2 * POOL):
            with pytest.raises(psycopg.errors.DivisionByZero):
                database.execute_read("SELECT 1 / 0")
            with pytest.raises(psycopg.errors.DivisionByZero):
                database.execute_write(lambda conn: conn.execute("SELECT 1 / 0"))
        assert_nothing_is_left(pooled_dsn)


# --- every way to run statements ----------------------------------------------------------------------------------


def test_everything_that_psycopg_can_do_in_a_transaction_works(ledger: Ledger, pooled_dsn: str) -> None:
    def write(conn: Connection[Any]) -> list[Any]:
        with conn.cursor().copy("COPY ledger.sessions (session_id, value) FROM STDIN") as copy:
            for number in range(100, 200):
                copy.write_row((number, 0))
        conn.cursor().executemany(
            "UPDATE ledger.sessions SET value = value + 1 WHERE session_id = %s",
            [(number,) for number in range(100, 150)],
        )
        with conn.transaction():
            conn.execute("UPDATE ledger.sessions SET value = value + 1 WHERE session_id >= 100")
        with suppress(psycopg.errors.UniqueViolation), conn.transaction():
            conn.execute("INSERT INTO ledger.sessions VALUES (100, 0)")
        with conn.pipeline():
            cursors = [conn.execute("SELECT sum(value) + %s FROM ledger.sessions", [n], prepare=True) for n in range(3)]
        return [cursor.fetchall() for cursor in cursors]

    def read(conn: Connection[Any]) -> list[Any]:
        with conn.cursor(name="by_tens") as cursor:
            cursor.itersize = 10
            counted = len(list(cursor.execute("SELECT * FROM ledger.sessions WHERE session_id >= 100")))
        streamed = sum(1 for _ in conn.cursor().stream("SELECT * FROM ledger.sessions WHERE session_id >= 100"))
        with conn.cursor().copy(
            "COPY (SELECT session_id FROM ledger.sessions WHERE session_id < 103) TO STDOUT"
        ) as copy:
            copied = [row[0] for row in copy.rows()]
        return [counted, streamed, copied[-3:]]

    with Database(settings(pooled_dsn)) as database:
        assert database.execute_write(write) == [[(150,)], [(151,)], [(152,)]]
        assert database.execute_read(read) == [100, 100, ["100", "101", "102"]]
        rows = database.execute_write("DELETE FROM ledger.sessions WHERE session_id >= 198 RETURNING session_id")
        assert sorted(rows) == [(198,), (199,)]
        assert database.execute_write("DELETE FROM ledger.sessions WHERE session_id >= 100") == 98
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            database.execute_read("DELETE FROM ledger.sessions RETURNING session_id")
        assert_nothing_is_left(pooled_dsn)


def test_nothing_is_prepared_however_often_it_runs(pooled_dsn: str) -> None:
    def operation(conn: Connection[Any]) -> None:
        for number in range(3):
            conn.execute("SELECT %s::int", [number], prepare=True)

    with Database(settings(pooled_dsn)) as database, ThreadPoolExecutor(8) as threads:

        def work(number: int) -> None:
            with as_service("prepare"):
                for _ in range(10):
                    assert database.execute_read("SELECT %s::int", [number]) == [(number,)]
                    database.execute_write("UPDATE ledger.sessions SET value = %s WHERE session_id = %s", [1, number])
                    database.execute_read(operation)
                    database.execute_write(operation)

        list(threads.map(work, range(8)))
        assert_nothing_is_left(pooled_dsn)


def test_time_limits_reach_the_server_and_stay_in_their_transaction(pooled_dsn: str) -> None:
    limit = "SELECT current_setting('statement_timeout')"
    with Database(settings(pooled_dsn, statement_timeout=7.5)) as database:
        for call in (database.execute_read, database.execute_write):
            for operation in (limit, lambda conn: conn.execute(limit).fetchall()):
                assert call(operation) == [("7500ms",)]
                assert call(operation, timeout=2) == [("2s",)]
                assert call(operation, timeout=float("inf")) == [("0",)]
            for operation in ("SELECT pg_sleep(30)", lambda conn: conn.execute("SELECT pg_sleep(30)")):
                with pytest.raises(psycopg.errors.QueryCanceled):
                    call(operation, timeout=0.2)
        assert_nothing_is_left(pooled_dsn)


def test_reads_without_an_identity_still_cannot_write_and_have_a_time_limit(ledger: Ledger, pooled_dsn: str) -> None:
    ledger.ask("GRANT USAGE ON SCHEMA ledger TO equitie_app; GRANT ALL ON ALL TABLES IN SCHEMA ledger TO equitie_app")
    count_up = "UPDATE ledger.sessions SET value = value + 1 WHERE session_id = 1 RETURNING value"
    with Database(settings(pooled_dsn, default_actor="service", service_role=None)) as database:
        whole_call = contextvars.Context().run
        assert whole_call(database.execute_read, "SELECT current_user") == [("equitie_app",)]
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            whole_call(database.execute_read, count_up)
        with pytest.raises(psycopg.errors.QueryCanceled):
            whole_call(database.execute_read, "SELECT pg_sleep(30)", timeout=0.2)
        assert whole_call(database.execute_write, count_up) == [(1,)]
        assert_nothing_is_left(pooled_dsn)


def test_an_operation_that_idles_does_not_hold_its_server_connection_for_ever(pooled_dsn: str) -> None:
    def idle(conn: Connection[Any]) -> None:
        conn.execute("SELECT 1")
        time.sleep(1)
        conn.execute("SELECT 1")

    with Database(settings(pooled_dsn, idle_in_transaction_timeout=0.2)) as database:
        for call in (database.execute_read, database.execute_write):
            with pytest.raises(psycopg.Error):
                call(idle, retry=False)
        assert_nothing_is_left(pooled_dsn)


# --- a COMMIT that is not answered --------------------------------------------------------------------------------


def test_a_commit_whose_reply_is_lost_is_found_committed(
    ledger: Ledger, application: Database, proxy: TcpProxy, transfer: Transfer
) -> None:
    fault = proxy.cut_reply_to(commit_of(transfer))
    make_or_learn(transfer, application)
    assert fault.struck.is_set()
    assert ledger.compare([transfer]) == Discrepancies()
    assert ledger.times_there(transfer) == 1


def test_a_pooler_restarted_after_it_has_passed_the_commit_on(
    ledger: Ledger, application: Database, proxy: TcpProxy, pgbouncer: PgBouncer, transfer: Transfer
) -> None:
    fault = proxy.cut_reply_to(commit_of(transfer), then=pgbouncer.restart)
    make_or_learn(transfer, application)
    assert fault.struck.is_set()
    assert ledger.compare([transfer]) == Discrepancies()
    assert ledger.times_there(transfer) == 1


def make_or_learn(transfer: Transfer, application: Database) -> None:
    """Make it, or be told that it is made and that its result is lost, which only a key would have kept."""
    try:
        assert transfer.make(application, timeout=20) == 1
    except ResultLostError:
        assert transfer.as_statement
        assert transfer.key is None
    assert transfer.told == "acknowledged"


def test_a_commit_that_never_reaches_the_pooler_is_found_aborted_and_made_again(
    ledger: Ledger, application: Database, proxy: TcpProxy, listener: Listener, transfer: Transfer
) -> None:
    fault = proxy.cut_before(commit_of(transfer))
    assert transfer.make(application, timeout=20) == 1
    assert fault.struck.is_set()
    assert ledger.compare([transfer]) == Discrepancies()
    assert [event.attempts for event in listener.of(OperationEnded)] == [2]


def test_a_transaction_that_the_pooler_holds_open_is_ended_by_its_real_process_id(
    ledger: Ledger, application: Database, proxy: TcpProxy, listener: Listener
) -> None:
    """PgBouncer believes that its client is there; the process id it has told the client is nobody's."""
    transfer = fresh_transfer()
    fault = proxy.cut_before(b"COMMIT", half_open=True)
    assert transfer.make(application, timeout=20) == 1
    assert fault.struck.is_set()
    assert ledger.compare([transfer]) == Discrepancies()
    assert [event.outcome for event in listener.of(CommitResolved)] == ["aborted"]
    assert [event.attempts for event in listener.of(OperationEnded)] == [2]


@pytest.mark.parametrize("key", [None, "key of the terminated"])
def test_a_server_process_that_ends_just_before_the_commit(
    ledger: Ledger, application: Database, listener: Listener, key: str | None
) -> None:
    transfer = fresh_transfer()
    runs: list[int] = []

    def operation(connection: Connection[Any]) -> int:
        value = transfer.operation(connection)
        runs.append(backend_of(connection))
        if len(runs) == 1:
            ledger.ask("SELECT pg_terminate_backend(%s, 5000)", [runs[0]])
        return value

    if key is not None:
        key = f"{key} {uuid4()}"
    assert application.execute_write(operation, name="transfer", idempotency_key=key, timeout=20) == 1
    assert len(runs) == 2
    assert ledger.times_there(transfer) == 1


# --- servers and poolers that die ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["terminated", "crashed", "restarted", "pooler restarted"])
def test_a_server_process_that_dies_under_an_operation_is_ridden_out(
    primary: EmbeddedServer, ledger: Ledger, application: Database, pgbouncer: PgBouncer, how: str
) -> None:
    transfer = fresh_transfer()
    runs: list[int] = []

    def operation(connection: Connection[Any]) -> int:
        value = transfer.operation(connection)
        runs.append(backend_of(connection))
        if len(runs) == 1:
            if how == "terminated":
                ledger.ask("SELECT pg_terminate_backend(%s, 5000)", [runs[0]])
            elif how == "crashed":
                os.kill(runs[0], signal.SIGKILL)
            elif how == "restarted":
                primary.restart("immediate")
            else:
                pgbouncer.restart()
        connection.execute("SELECT pg_sleep(%s)", [30 if len(runs) == 1 else 0])
        return value

    assert application.execute_write(operation, name="transfer", timeout=25) == 1
    assert len(runs) == 2
    assert ledger.times_there(transfer) == 1


@pytest.mark.parametrize("which", ["server", "pooler"])
def test_a_restart_under_idle_connections_costs_no_failed_call(
    primary: EmbeddedServer, ledger: Ledger, pooled_dsn: str, pgbouncer: PgBouncer, which: str
) -> None:
    with Database(settings(pooled_dsn, min_size=20, max_size=20)) as database, ThreadPoolExecutor(8) as threads:
        wait_until(lambda: database.pool.primary.stats()["idle"] == 20)

        def call(number: int) -> bool:
            with as_service("restart"):
                if number % 2:
                    return database.execute_read("SELECT true") == [(True,)]
                return bool(database.execute_write("UPDATE ledger.sessions SET value = value + 1 WHERE session_id = 1"))

        assert all(threads.map(call, range(40)))  # server connections are there
        if which == "server":
            primary.restart()
        else:
            pgbouncer.restart()
        assert all(threads.map(call, range(100)))
    assert ledger.ask("SELECT value FROM ledger.sessions WHERE session_id = 1") == [(70,)]


def test_an_outage_behind_the_pooler_is_ridden_out(
    primary: EmbeddedServer, ledger: Ledger, application: Database, transfer: Transfer
) -> None:
    application.execute_read("SELECT 1")
    # Not stop(): that deletes a temporary server.
    primary.kill()
    back = threading.Timer(1.0, primary.start)
    back.start()
    try:
        assert transfer.make(application, timeout=30) == 1
    finally:
        back.join()
    assert ledger.compare([transfer]) == Discrepancies()


def test_money_is_moved_once_while_pooler_and_links_fail(
    ledger: Ledger, pooled_dsn: str, pgbouncer: PgBouncer, proxy: TcpProxy
) -> None:
    with (
        Database(settings(proxy.dsn, max_size=10)) as database,
        Load(ledger, database, timeout=20) as load,
    ):
        for _ in range(3):
            load.await_acknowledged(40)
            pgbouncer.restart()
            load.await_acknowledged(40)
            proxy.cut()
            load.await_acknowledged(20)
            with suppress(psycopg.Error):
                ledger.ask(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE usename = 'equitie_app' AND backend_xid IS NOT NULL"
                )
    assert load.compare() == Discrepancies()
    assert_nothing_is_left(pooled_dsn)


# --- idempotency keys ---------------------------------------------------------------------------------------------


def test_a_key_is_good_for_one_run_whoever_repeats_it(ledger: Ledger, pooled_dsn: str, app_role_dsn: str) -> None:
    transfer = fresh_transfer(key="repeated")
    with Database(settings(pooled_dsn)) as one, Database(settings(pooled_dsn)) as other:
        with Database(settings(app_role_dsn)) as direct:
            assert [transfer.make(database, timeout=20) for database in (one, other, direct, one)] == [1, 1, 1, 1]
        assert ledger.times_there(transfer) == 1

        both = fresh_transfer(key="at once")
        together = threading.Barrier(6)

        def make(number: int) -> int:
            together.wait()
            with as_service("at once"):
                return both.make(one if number % 2 else other, timeout=20)

        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(make, range(6))) == [2] * 6
        assert ledger.times_there(both) == 1
        with acting_as(UUID(int=7)), pytest.raises(ConfigurationError, match="another actor"):
            one.execute_write("SELECT 1", name="transfer", idempotency_key=both.key)


# --- replicas and promotions --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_writes_are_read_back_from_replicas_behind_a_pooler(
    primary: EmbeddedServer, ledger: Ledger, pooled_dsn: str, app_role_dsn: str, listener: Listener
) -> None:
    with primary.replica() as replica, PgBouncer(replica) as before_replica:
        read_dsn = before_replica.dsn(app_role_dsn)
        with Database(settings(pooled_dsn, replicas=[read_dsn]), hooks=[listener]) as database:
            count_up = "UPDATE ledger.sessions SET value = value + 1 WHERE session_id = 1 RETURNING value"
            for number in range(1, 51):
                if number % 2:
                    assert database.execute_write(count_up) == [(number,)]
                else:
                    assert database.execute_write(lambda conn: conn.execute(count_up).fetchall()) == [(number,)]
                assert database.execute_read("SELECT value FROM ledger.sessions WHERE session_id = 1") == [(number,)]
            replica_stays_behind(replica, database, number)
            wait_until(lambda: database.execute_read("SELECT pg_is_in_recovery()") == [(True,)])
    assert {event.node_role for event in listener.of(StatementEnded)} == {"primary", "replica"}


def replica_stays_behind(replica: EmbeddedServer, database: Database, number: int) -> None:
    """However long a replica lags, reads of what was just written are served."""
    with psycopg.connect(replica.dsn(), autocommit=True) as superuser:
        superuser.execute("SELECT pg_wal_replay_pause()")
        try:
            database.execute_write("UPDATE ledger.sessions SET value = value + 1 WHERE session_id = 1")
            for _ in range(150):
                assert database.execute_read("SELECT value FROM ledger.sessions WHERE session_id = 1") == [
                    (number + 1,)
                ]
        finally:
            superuser.execute("SELECT pg_wal_replay_resume()")


@pytest.mark.slow
def test_a_promotion_that_the_pooler_did_not_notice(server: EmbeddedServer) -> None:
    """PgBouncer goes on telling new clients that the server is a standby, as it was when PgBouncer first saw it."""
    with contextlib.ExitStack() as stack:
        from equitie_data.embedded import EmbeddedServer

        old = stack.enter_context(EmbeddedServer(bin_dir=server.bin_dir, settings={"wal_level": "replica"}))
        app_role_dsn = provision(old)
        new = stack.enter_context(old.replica())
        pgbouncer = stack.enter_context(PgBouncer(new))
        pooled_dsn = pgbouncer.dsn(app_role_dsn)
        with psycopg.connect(pooled_dsn) as seen:
            assert seen.info.parameter_status("in_hot_standby") == "on"
        new.promote()
        with psycopg.connect(pooled_dsn) as seen:
            assert seen.info.parameter_status("in_hot_standby") == "on"
            assert seen.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)
        ledger = Ledger(new.dsn(DATABASE))
        proxy = stack.enter_context(TcpProxy(pooled_dsn))
        database = stack.enter_context(Database(settings(proxy.dsn)))
        transfer = fresh_transfer()
        assert transfer.make(database, timeout=5) == 1
        again = fresh_transfer()
        fault = proxy.cut_reply_to(b"COMMIT")
        assert again.make(database, timeout=10) == 2
        assert fault.struck.is_set()
        assert ledger.compare([transfer, again]) == Discrepancies()
