"""`execute_read` and `execute_write` against a real server."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from equitie_data import Database, NoActorError, Settings, acting_as, as_service
from equitie_data.context import current_transaction
from equitie_data.errors import (
    CheckoutTimeoutError,
    ConfigurationError,
    NotOpenError,
    OperationEndedTransactionError,
    ReadOnlyError,
    SwallowedErrorError,
    TransactionError,
)
from equitie_data.hooks import OperationEnded, OperationStarted, Retried, StatementEnded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

WHO = "SELECT current_setting('role'), nullif(current_setting('request.jwt.claims'), '')::json ->> 'sub'"
ADD_COMPANY = "INSERT INTO public.companies_clean (company_name) VALUES (%s)"
COUNT_COMPANIES = "SELECT count(*) FROM public.companies_clean WHERE company_name = %s"


class Listener:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: object) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def listener(database: Database) -> Iterator[Listener]:
    listener = Listener()
    database.hooks.add(listener)
    yield listener
    database.hooks.remove(listener)


@pytest.fixture
def service() -> Iterator[None]:
    with as_service("test"):
        yield


def count(database: Database, name: str) -> int:
    with as_service("count"):
        return int(database.execute_read(COUNT_COMPANIES, [name], consistency="strong")[0][0])


# --- who acts -----------------------------------------------------------------------------------------------------


def test_nothing_runs_as_nobody(database: Database) -> None:
    for call in (database.execute_read, database.execute_write):
        with pytest.raises(NoActorError, match="acting_as"):
            call("SELECT 1")


def test_both_forms_run_as_the_actor(database: Database) -> None:
    user = uuid4()
    with acting_as(user):
        for call in (database.execute_read, database.execute_write):
            assert call(WHO) == [("authenticated", str(user))]
            assert call(lambda conn: conn.execute(WHO).fetchall()) == [("authenticated", str(user))]
    with as_service("test"):
        assert database.execute_read(WHO) == [("service_role", None)]


def test_nothing_of_the_identity_is_left_on_the_connection(app_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, min_size=1, max_size=1)) as database:
        with acting_as(uuid4()):
            database.execute_read(WHO)
            database.execute_write(lambda conn: conn.execute(WHO))
        connection = database.pool.primary.checkout(5.0)
        try:
            left = connection.execute(
                "SELECT current_setting('role'), current_setting('request.jwt.claims', true), "
                "current_setting('equitie.context', true), current_setting('transaction_read_only')"
            ).fetchone()
        finally:
            database.pool.primary.checkin(connection)
        assert left == ("none", "", "", "off")


def test_a_thread_storm_with_random_actors_leaks_no_identity(app_dsn: str) -> None:
    users = [uuid4() for _ in range(50)]

    def work(seed: int) -> Counter[str]:
        rng = random.Random(seed)
        seen: Counter[str] = Counter()
        for _ in range(150):
            user = rng.choice(users)
            kind = rng.randrange(4)
            with acting_as(user):
                try:
                    if kind == 0:
                        row = database.execute_read(WHO)[0]
                    elif kind == 1:
                        row = database.execute_write(lambda conn: conn.execute(WHO).fetchone())
                    elif kind == 2:
                        row = database.execute_write(_raise_after)
                    else:
                        row = database.execute_read(lambda conn: conn.execute(WHO).fetchone())
                except ZeroDivisionError as error:
                    row = error.args[0]
            seen["own" if row == ("authenticated", str(user)) else "other"] += 1
        return seen

    def _raise_after(conn: Connection[Any]) -> None:
        raise ZeroDivisionError(conn.execute(WHO).fetchone())

    with Database(Settings(dsn=app_dsn, min_size=3, max_size=3)) as database, ThreadPoolExecutor(12) as threads:
        total = sum(threads.map(work, range(12)), Counter())
    assert total == {"own": 12 * 150}


def test_an_operation_that_sets_the_role_for_the_session_leaks_it_to_nobody(app_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, min_size=1, max_size=1)) as database:
        with as_service("test"):
            database.execute_write(lambda conn: conn.execute("SET SESSION ROLE service_role"))
        user = uuid4()
        with acting_as(user):
            assert database.execute_read(WHO) == [("authenticated", str(user))]
            assert database.execute_read(lambda conn: conn.execute(WHO).fetchone()) == ("authenticated", str(user))


def test_the_application_s_default_actor_can_be_the_service(app_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, default_actor="service")) as database:
        assert database.execute_read(WHO) == [("service_role", None)]
        user = uuid4()
        with acting_as(user):
            assert database.execute_read(WHO) == [("authenticated", str(user))]


# --- what comes back ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("service")
def test_results_of_the_statement_form(database: Database) -> None:
    assert database.execute_read("SELECT %s::int + 1, 'x'", [1]) == [(2, "x")]
    assert database.execute_read("SELECT %(n)s::int AS n", {"n": 5}, row_factory=dict_row) == [{"n": 5}]
    table = sql.Identifier("public", "companies_clean")
    assert database.execute_read(sql.SQL("SELECT count(*) FROM {}").format(table)) == [(0,)]
    assert database.execute_write(ADD_COMPANY, ["A"]) == 1
    assert database.execute_write("UPDATE public.companies_clean SET company_sector = 'x' WHERE false") == 0
    returned = database.execute_write(ADD_COMPANY + " RETURNING company_name", ["B"])
    assert returned == [("B",)]


@pytest.mark.usefixtures("service")
def test_params_do_not_go_with_a_callable(database: Database) -> None:
    with pytest.raises(ConfigurationError, match="params belong to SQL"):
        database.execute_read(lambda conn: None, [1])  # type: ignore[call-overload]


@pytest.mark.usefixtures("service")
def test_the_same_statement_many_times_is_prepared_and_stays_right(database: Database) -> None:
    for number in range(30):
        assert database.execute_read("SELECT %s::int", [number]) == [(number,)]
        assert database.execute_read(lambda conn, n=number: conn.execute("SELECT %s::int", [n]).fetchone()) == (number,)


@pytest.mark.usefixtures("service")
def test_more_statements_than_the_cache_holds(app_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, min_size=1, max_size=1)) as database:
        for _ in range(7):
            for number in range(130):
                assert database.execute_read(f"SELECT {number}") == [(number,)]
                assert database.execute_read("SELECT 1") == [(1,)]


@pytest.mark.usefixtures("service")
def test_large_parameters_and_results_cross_the_pipeline(database: Database) -> None:
    text = "é" * 3_000_000
    assert database.execute_read("SELECT %s::text || generate_series(1, 3)", [text]) == [
        (f"{text}{number}",) for number in (1, 2, 3)
    ]


# --- what an operation may do -------------------------------------------------------------------------------------


def _copy(conn: Connection[Any]) -> Any:
    with conn.cursor().copy(f"COPY ({WHO}) TO STDOUT") as copy:
        (row,) = copy.rows()
        return row


def _stream(conn: Connection[Any]) -> Any:
    return next(iter(list(conn.cursor().stream(WHO))))


def _server_cursor(conn: Connection[Any]) -> Any:
    with conn.cursor(name="c") as cursor:
        return cursor.execute(WHO).fetchone()


def _pipeline(conn: Connection[Any]) -> Any:
    with conn.pipeline():
        cursor = conn.execute(WHO)
        conn.execute("SELECT 1")
    return cursor.fetchone()


def _nested(conn: Connection[Any]) -> Any:
    with conn.transaction():
        return conn.execute(WHO).fetchone()


def _script(conn: Connection[Any]) -> Any:
    cursor = conn.execute(f"SELECT 1; {WHO}")
    cursor.nextset()
    return cursor.fetchone()


def _executemany(conn: Connection[Any]) -> Any:
    cursor = conn.cursor()
    cursor.executemany(WHO + " WHERE %s > 0", [(1,), (2,)], returning=True)
    return cursor.fetchone()


@pytest.mark.parametrize("operation", [_copy, _stream, _server_cursor, _pipeline, _nested, _script, _executemany])
@pytest.mark.parametrize("call", ["execute_read", "execute_write"])
def test_every_way_to_run_a_first_statement_has_the_prologue(database: Database, operation: Any, call: str) -> None:
    user = uuid4()
    with acting_as(user):
        assert tuple(getattr(database, call)(operation)) == ("authenticated", str(user))


@pytest.mark.usefixtures("service")
def test_a_savepoint_rolls_back_alone(database: Database) -> None:
    def operation(conn: Connection[Any]) -> None:
        conn.execute(ADD_COMPANY, ["kept"])
        with pytest.raises(psycopg.errors.UniqueViolation), conn.transaction():
            conn.execute(ADD_COMPANY, ["kept"])
        conn.execute(ADD_COMPANY, ["kept too"])

    database.execute_write(operation)
    assert count(database, "kept") == count(database, "kept too") == 1


@pytest.mark.usefixtures("service")
def test_a_read_sees_one_snapshot(database: Database) -> None:
    def operation(conn: Connection[Any]) -> tuple[Any, Any]:
        before = conn.execute(COUNT_COMPANIES, ["late"]).fetchone()
        database.execute_write(ADD_COMPANY, ["late"])
        return before, conn.execute(COUNT_COMPANIES, ["late"]).fetchone()

    assert database.execute_read(operation) == ((0,), (0,))
    assert count(database, "late") == 1


@pytest.mark.usefixtures("service")
def test_a_read_cannot_write(database: Database) -> None:
    with pytest.raises(ReadOnlyError, match="use execute_write"):
        database.execute_read(ADD_COMPANY, ["x"])
    with pytest.raises(ReadOnlyError):
        database.execute_read(lambda conn: conn.execute(ADD_COMPANY, ["x"]))
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        database.execute_read(ADD_COMPANY, ["x"])
    assert database.execute_write(ADD_COMPANY, ["x"]) == 1


# --- how a write ends ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("service")
def test_an_exception_rolls_back_and_comes_through(database: Database) -> None:
    def operation(conn: Connection[Any]) -> None:
        conn.execute(ADD_COMPANY, ["never"])
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        database.execute_write(operation)
    assert count(database, "never") == 0


@pytest.mark.usefixtures("service")
def test_a_swallowed_error_is_no_silent_rollback(database: Database) -> None:
    def operation(conn: Connection[Any]) -> str:
        conn.execute(ADD_COMPANY, ["lost"])
        try:
            conn.execute("SELECT 1 / 0")
        except psycopg.errors.DivisionByZero:
            return "fine"
        return "not reached"

    with pytest.raises(SwallowedErrorError, match="nothing was written"):
        database.execute_write(operation)
    assert count(database, "lost") == 0


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_operation_cannot_end_the_transaction_by_method(database: Database, end: str) -> None:
    def operation(conn: Connection[Any]) -> None:
        conn.execute(ADD_COMPANY, ["half"])
        getattr(conn, end)()

    with pytest.raises(OperationEndedTransactionError, match="the library commits"):
        database.execute_write(operation)
    assert count(database, "half") == 0


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_an_operation_that_ends_the_transaction_by_sql_is_reported_and_not_repeated(
    database: Database, end: str
) -> None:
    runs = []

    def operation(conn: Connection[Any]) -> None:
        runs.append(1)
        conn.execute(ADD_COMPANY, ["ended"])
        conn.execute(end)

    with pytest.raises(OperationEndedTransactionError):
        database.execute_write(operation)
    assert len(runs) == 1
    assert count(database, "ended") == (1 if end == "COMMIT" else 0)


@pytest.mark.usefixtures("service")
def test_an_unfinished_stream_is_refused_and_rolled_back(database: Database) -> None:
    kept: list[Any] = []

    def operation(conn: Connection[Any]) -> None:
        conn.execute(ADD_COMPANY, ["unfinished"])
        stream = conn.cursor().stream("SELECT generate_series(1, 100000)")
        next(stream)
        kept.append(stream)

    with pytest.raises(TransactionError, match="still running"):
        database.execute_write(operation)
    assert count(database, "unfinished") == 0


@pytest.mark.usefixtures("service")
def test_a_deferred_constraint_fails_the_commit_and_nothing_is_written(database: Database, owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("CREATE TABLE public.d (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        owner.execute("GRANT ALL ON public.d TO service_role")
    with pytest.raises(psycopg.errors.UniqueViolation):
        database.execute_write(lambda conn: conn.execute("INSERT INTO public.d VALUES (1), (1)"))
    with pytest.raises(psycopg.errors.UniqueViolation):
        database.execute_write("INSERT INTO public.d VALUES (1), (1)")
    assert database.execute_read("SELECT count(*) FROM public.d") == [(0,)]


@pytest.mark.usefixtures("service")
def test_what_runs_before_commit_runs_in_the_same_transaction(database: Database) -> None:
    attempts: list[dict[Any, Any]] = []

    def operation(conn: Connection[Any]) -> None:
        transaction = current_transaction()
        assert transaction is not None
        assert transaction.connection is conn
        assert transaction.local == {}
        transaction.local["seen"] = True
        attempts.append(transaction.local)
        transaction.before_commit(lambda c: c.execute(ADD_COMPANY, ["rider"]))
        conn.execute(ADD_COMPANY, ["driver"])
        if len(attempts) == 1:
            conn.execute("DO $$BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END$$")

    database.execute_write(operation)
    assert len(attempts) == 2
    assert count(database, "driver") == count(database, "rider") == 1
    assert current_transaction() is None

    def fails(conn: Connection[Any]) -> None:
        transaction = current_transaction()
        assert transaction is not None
        conn.execute(ADD_COMPANY, ["doomed"])
        transaction.before_commit(lambda c: c.execute("SELECT 1 / 0"))

    with pytest.raises(psycopg.errors.DivisionByZero):
        database.execute_write(fails)
    assert count(database, "doomed") == 0


# --- retries ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("state", "attempts"), [("40001", 4), ("40P01", 4), ("23505", 1), ("57014", 1), ("55P03", 1), ("22012", 1)]
)
def test_a_transient_error_is_retried_and_any_other_is_not(
    database: Database, listener: Listener, state: str, attempts: int
) -> None:
    runs: list[int] = []

    def operation(conn: Connection[Any]) -> None:
        runs.append(1)
        conn.execute(f"DO $$BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END$$")

    with pytest.raises(psycopg.Error) as caught:
        database.execute_write(operation)
    assert caught.value.sqlstate == state
    assert len(runs) == attempts
    assert len(listener.of(Retried)) == attempts - 1
    assert listener.of(OperationEnded)[0].attempts == attempts


@pytest.mark.usefixtures("service")
def test_retry_false_makes_one_attempt(database: Database) -> None:
    runs: list[int] = []

    def operation(conn: Connection[Any]) -> None:
        runs.append(1)
        conn.execute("DO $$BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END$$")

    with pytest.raises(psycopg.errors.SerializationFailure):
        database.execute_write(operation, retry=False)
    assert len(runs) == 1


@pytest.mark.usefixtures("service")
def test_a_backend_killed_in_mid_operation_costs_no_failed_call_and_no_double(
    database: Database, owner_dsn: str
) -> None:
    pids: list[int] = []

    def operation(conn: Connection[Any]) -> int:
        conn.execute(ADD_COMPANY, ["once"])
        pids.append(conn.info.backend_pid)
        if len(pids) == 1:
            with psycopg.connect(owner_dsn, autocommit=True) as owner:
                owner.execute("SELECT pg_terminate_backend(%s, 5000)", pids)
        return conn.execute(COUNT_COMPANIES, ["once"]).fetchone()[0]  # type: ignore[index]

    assert database.execute_write(operation) == 1
    assert len(set(pids)) == 2
    assert count(database, "once") == 1


@pytest.mark.usefixtures("service")
def test_idle_connections_that_the_server_closed_cost_no_failed_call(app_dsn: str, owner_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, min_size=5, max_size=5)) as database:
        barrier = threading.Barrier(5)

        def hold(conn: Connection[Any]) -> int:
            barrier.wait()
            return conn.info.backend_pid

        def in_context() -> int:
            with as_service("hold"):
                return database.execute_read(hold)

        with ThreadPoolExecutor(5) as threads:
            pids = {future.result() for future in [threads.submit(in_context) for _ in range(5)]}
        assert len(pids) == 5
        with psycopg.connect(owner_dsn, autocommit=True) as owner:
            for pid in pids:
                owner.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        listener = Listener()
        database.hooks.add(listener)
        for _ in range(20):
            assert database.execute_read("SELECT 1") == [(1,)]
        assert listener.of(Retried) == []


@pytest.mark.usefixtures("service")
def test_a_cached_plan_whose_result_changed_is_planned_again(database: Database, owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("CREATE TABLE public.shape (a int)")
        owner.execute("INSERT INTO public.shape VALUES (1)")
        owner.execute("GRANT SELECT ON public.shape TO service_role")
        for _ in range(12):
            assert database.execute_read("SELECT * FROM public.shape") == [(1,)]
        owner.execute("ALTER TABLE public.shape ADD COLUMN b int DEFAULT 2")
        for _ in range(12):
            assert database.execute_read("SELECT * FROM public.shape") == [(1, 2)]
        owner.execute("ALTER TABLE public.shape ADD COLUMN c int DEFAULT 3")
        assert database.execute_read(lambda conn: conn.execute("SELECT * FROM public.shape").fetchall()) == [(1, 2, 3)]


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("service")
def test_timeout_bounds_a_statement_on_the_server(database: Database) -> None:
    for operation in ("SELECT pg_sleep(30)", lambda conn: conn.execute("SELECT pg_sleep(30)")):
        with pytest.raises(psycopg.errors.QueryCanceled):
            database.execute_read(operation, timeout=0.2)  # type: ignore[call-overload]
    assert database.execute_read("SELECT current_setting('statement_timeout')") == [("1min",)]
    assert database.execute_read("SELECT current_setting('statement_timeout')", timeout=math.inf) == [("0",)]
    assert database.execute_read("SELECT current_setting('statement_timeout')", timeout=2.5) == [("2500ms",)]


def test_a_pool_in_use_says_so(app_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, min_size=1, max_size=1, checkout_timeout=0.3)) as database, as_service("test"):

        def nested(conn: Connection[Any]) -> None:
            conn.execute("SELECT 1")
            database.execute_read("SELECT 1")

        with pytest.raises(CheckoutTimeoutError, match="All 1 connections to primary"):
            database.execute_write(nested)
        assert database.execute_read("SELECT 1") == [(1,)]


# --- life and counters --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("service")
def test_a_database_that_is_not_open_says_so(app_dsn: str) -> None:
    database = Database(app_dsn)
    with pytest.raises(NotOpenError, match="not open"):
        database.execute_read("SELECT 1")
    with database:
        assert database.execute_read("SELECT 1") == [(1,)]
    with pytest.raises(NotOpenError):
        database.execute_read("SELECT 1")
    with database:
        assert database.execute_read("SELECT 1") == [(1,)]


@pytest.mark.usefixtures("service")
def test_the_pool_s_counters(app_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, min_size=2, max_size=2)) as database, ThreadPoolExecutor(8) as threads:

        def work(_: int) -> None:
            with as_service("count"):
                for _ in range(25):
                    database.execute_read("SELECT 1")

        before = database.pool.primary.stats()["checkouts"]
        list(threads.map(work, range(8)))
        stats = next(iter(database.pool.get_stats().values()))
        assert stats["checkouts"] - before == 200
        assert (stats["in_use"], stats["role"], stats["healthy"], stats["max_size"]) == (0, "primary", True, 2)
        assert stats["size"] <= 2


@pytest.mark.usefixtures("service")
def test_every_statement_is_reported_without_its_parameters(database: Database, listener: Listener) -> None:
    secret = f"secret-{uuid4()}"
    database.execute_write(ADD_COMPANY, [secret], name="add")

    def operation(conn: Connection[Any]) -> None:
        conn.execute(COUNT_COMPANIES, [secret])
        conn.cursor().executemany(ADD_COMPANY, [(f"{secret}{n}",) for n in range(3)])
        with conn.cursor().copy("COPY public.companies_clean (company_name) FROM STDIN") as copy:
            copy.write_row((secret + "x",))
        list(conn.cursor().stream("SELECT generate_series(1, 4)"))
        with conn.transaction(), pytest.raises(psycopg.errors.UniqueViolation), conn.transaction():
            conn.execute(ADD_COMPANY, [secret])

    database.execute_write(operation, name="many")
    ended = [event for event in listener.of(StatementEnded) if event.name in ("add", "many")]
    assert [(event.rows, event.sqlstate) for event in ended] == [
        (1, None),
        (1, None),
        (3, None),
        (1, None),
        (4, None),
        (None, "23505"),
    ]
    assert all(event.seconds > 0 and event.node_role == "primary" for event in ended)
    assert [event.name for event in listener.of(OperationStarted)] == ["add", "many"]
    assert [(event.name, event.error) for event in listener.of(OperationEnded)] == [("add", None), ("many", None)]
    assert secret not in repr(listener.events)


@pytest.mark.usefixtures("service")
def test_a_forked_child_uses_connections_of_its_own(database: Database) -> None:
    import os

    mine = database.execute_read("SELECT pg_backend_pid()")[0][0]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child
        try:
            pids = {database.execute_read("SELECT pg_backend_pid()")[0][0] for _ in range(3)}
            os.write(write, b"ok" if mine not in pids else b"shared")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"ok"
    os.waitpid(child, 0)
    assert database.execute_read("SELECT 1") == [(1,)]


def test_user_ids_may_be_uuid_or_text(database: Database) -> None:
    user = UUID(int=7)
    for form in (user, str(user)):
        with acting_as(form):
            assert database.execute_read(WHO)[0][1] == str(user)


def test_roles_left_behind_on_every_connection_cost_no_call(app_dsn: str) -> None:
    everybody = threading.Barrier(4)

    def leave_a_role_behind(conn: Connection[Any]) -> None:
        everybody.wait(20)
        conn.execute("SET ROLE authenticated")

    def spoil(_: int) -> None:
        with as_service("test"):
            database.execute_write(leave_a_role_behind, retry=False)

    settings = Settings(dsn=app_dsn, min_size=4, max_size=4, read_attempts=1)
    with Database(settings) as database, ThreadPoolExecutor(4) as threads, as_service("test"):
        list(threads.map(spoil, range(4)))
        assert [database.execute_read(WHO) for _ in range(8)] == [[("service_role", None)]] * 8
