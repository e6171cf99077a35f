"""`AsyncDatabase` against a real server: what `test_pool` asks of the blocking one, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from equitie_data import AsyncDatabase, AuditAction, NoActorError, Settings, acting_as, as_service
from equitie_data.context import current_transaction, session_token
from equitie_data.embedded import EmbeddedServer
from equitie_data.errors import (
    CheckoutTimeoutError,
    ConfigurationError,
    NotOpenError,
    OperationEndedTransactionError,
    ReadOnlyError,
    SwallowedErrorError,
    TransactionError,
    UnavailableError,
)
from equitie_data.hooks import Leaked, NodeEjected, OperationEnded, OperationStarted, Retried, StatementEnded
from equitie_data.provision import provision

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from psycopg import AsyncConnection

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


def awaited(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def count(database: AsyncDatabase, name: str) -> int:
    with as_service("count"):
        return int((await database.execute_read(COUNT_COMPANIES, [name], consistency="strong"))[0][0])


async def who(conn: AsyncConnection[Any]) -> Any:
    return await (await conn.execute(WHO)).fetchone()


def fail(state: str) -> str:
    return f"DO $$BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END$$"


# --- who acts -----------------------------------------------------------------------------------------------------


@awaited
async def test_nothing_runs_as_nobody(app_dsn: str) -> None:
    async with AsyncDatabase(app_dsn) as database:
        for call in (database.execute_read, database.execute_write):
            with pytest.raises(NoActorError, match="acting_as"):
                await call("SELECT 1")


@awaited
async def test_both_forms_run_as_the_actor(app_dsn: str) -> None:
    user = uuid4()
    async with AsyncDatabase(app_dsn) as database:
        with acting_as(user):
            for call in (database.execute_read, database.execute_write):
                assert await call(WHO) == [("authenticated", str(user))]
                assert await call(who) == ("authenticated", str(user))
        with as_service("test"):
            assert await database.execute_read(WHO) == [("service_role", None)]


@awaited
async def test_nothing_of_the_identity_is_left_on_the_connection(app_dsn: str) -> None:
    async with AsyncDatabase(Settings(dsn=app_dsn, min_size=1, max_size=1)) as database:
        with acting_as(uuid4()):
            await database.execute_read(WHO)
            await database.execute_write(who)
        connection = await database.pool.primary.checkout(5.0)
        try:
            cursor = await connection.execute(
                "SELECT current_setting('role'), current_setting('request.jwt.claims', true), "
                "current_setting('equitie.context', true), current_setting('transaction_read_only')"
            )
            assert await cursor.fetchone() == ("none", "", "", "off")
        finally:
            await database.pool.primary.checkin(connection)


@awaited
async def test_a_storm_of_tasks_with_random_actors_leaks_no_identity(app_dsn: str) -> None:
    users = [uuid4() for _ in range(50)]

    async def raise_after(conn: AsyncConnection[Any]) -> Any:
        raise ZeroDivisionError(await who(conn))

    async def work(seed: int) -> Counter[str]:
        rng = random.Random(seed)
        seen: Counter[str] = Counter()
        for _ in range(20):
            user = rng.choice(users)
            kind = rng.randrange(4)
            with acting_as(user):
                await asyncio.sleep(rng.random() / 1000)
                try:
                    if kind == 0:
                        row = (await database.execute_read(WHO))[0]
                    elif kind == 1:
                        row = await database.execute_write(who)
                    elif kind == 2:
                        row = await database.execute_write(raise_after)
                    else:
                        row = await database.execute_read(who)
                except ZeroDivisionError as error:
                    row = error.args[0]
            seen["own" if row == ("authenticated", str(user)) else "other"] += 1
        return seen

    async with AsyncDatabase(Settings(dsn=app_dsn, min_size=5, max_size=5)) as database:
        total = sum(await asyncio.gather(*map(work, range(200))), Counter())
        stats = next(iter(database.pool.get_stats().values()))
    assert total == {"own": 200 * 20}
    assert (stats["in_use"], stats["waiting"], stats["size"], stats["discarded"]) == (0, 0, 5, 0)


@awaited
async def test_the_application_s_default_actor_can_be_the_service(app_dsn: str) -> None:
    async with AsyncDatabase(Settings(dsn=app_dsn, default_actor="service")) as database:
        assert await database.execute_read(WHO) == [("service_role", None)]


@awaited
async def test_actor_deadline_and_session_belong_to_the_task(app_dsn: str) -> None:
    patient = Settings(dsn=app_dsn, min_size=1, max_size=1, checkout_timeout=3600.0, call_timeout=3600.0)
    async with AsyncDatabase(patient) as database:
        started = asyncio.Event()

        async def one() -> None:
            with as_service("one"):
                await started.wait()
                await database.execute_write(ADD_COMPANY, ["task"])

        async def other() -> None:
            started.set()
            with pytest.raises(NoActorError):
                await database.execute_read("SELECT 1")

        await asyncio.gather(one(), other())
        assert session_token() is None

        async def outer(conn: AsyncConnection[Any]) -> Any:
            await conn.execute("SELECT 1")
            await database.execute_read("SELECT 1")

        # The nested call waits for the only connection, but no longer than the outer one may.
        with as_service("test"), pytest.raises(CheckoutTimeoutError):
            await database.execute_read(outer, timeout=0.2)


# --- what comes back ----------------------------------------------------------------------------------------------


@awaited
async def test_results_of_the_statement_form(app_dsn: str) -> None:
    async with AsyncDatabase(app_dsn) as database:
        with as_service("test"):
            assert await database.execute_read("SELECT %s::int + 1, 'x'", [1]) == [(2, "x")]
            assert await database.execute_read("SELECT 5 AS n", row_factory=dict_row) == [{"n": 5}]
            assert await database.execute_write(ADD_COMPANY, ["A"]) == 1
            assert await database.execute_write("UPDATE public.companies_clean SET company_type = 'x' WHERE false") == 0
            assert await database.execute_write(ADD_COMPANY + " RETURNING company_name", ["B"]) == [("B",)]
            with pytest.raises(ConfigurationError, match="params belong to SQL"):
                await database.execute_read(who, [1])  # type: ignore[call-overload]
            for number in range(30):
                assert await database.execute_read("SELECT %s::int", [number]) == [(number,)]
            text = "é" * 3_000_000
            assert await database.execute_read("SELECT %s::text || generate_series(1, 3)", [text]) == [
                (f"{text}{number}",) for number in (1, 2, 3)
            ]


# --- what an operation may do -------------------------------------------------------------------------------------


async def _copy(conn: AsyncConnection[Any]) -> Any:
    async with conn.cursor().copy(f"COPY ({WHO}) TO STDOUT") as copy:
        rows = [row async for row in copy.rows()]
    return rows[0]


async def _stream(conn: AsyncConnection[Any]) -> Any:
    rows = [row async for row in conn.cursor().stream(WHO)]
    return rows[0]


async def _server_cursor(conn: AsyncConnection[Any]) -> Any:
    async with conn.cursor(name="c") as cursor:
        await cursor.execute(WHO)
        return await cursor.fetchone()


async def _pipeline(conn: AsyncConnection[Any]) -> Any:
    async with conn.pipeline():
        cursor = await conn.execute(WHO)
        await conn.execute("SELECT 1")
    return await cursor.fetchone()


async def _nested(conn: AsyncConnection[Any]) -> Any:
    async with conn.transaction():
        return await who(conn)


async def _script(conn: AsyncConnection[Any]) -> Any:
    cursor = await conn.execute(f"SELECT 1; {WHO}")
    cursor.nextset()
    return await cursor.fetchone()


async def _executemany(conn: AsyncConnection[Any]) -> Any:
    cursor = conn.cursor()
    await cursor.executemany(WHO + " WHERE %s > 0", [(1,), (2,)], returning=True)
    return await cursor.fetchone()


@pytest.mark.parametrize("operation", [_copy, _stream, _server_cursor, _pipeline, _nested, _script, _executemany])
@pytest.mark.parametrize("call", ["execute_read", "execute_write"])
@awaited
async def test_every_way_to_run_a_first_statement_has_the_prologue(app_dsn: str, operation: Any, call: str) -> None:
    user = uuid4()
    async with AsyncDatabase(app_dsn) as database:
        with acting_as(user):
            assert tuple(await getattr(database, call)(operation)) == ("authenticated", str(user))


@awaited
async def test_a_savepoint_rolls_back_alone(app_dsn: str) -> None:
    async def operation(conn: AsyncConnection[Any]) -> None:
        await conn.execute(ADD_COMPANY, ["kept"])
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with conn.transaction():
                await conn.execute(ADD_COMPANY, ["kept"])
        await conn.execute(ADD_COMPANY, ["kept too"])

    async with AsyncDatabase(app_dsn) as database:
        with as_service("test"):
            await database.execute_write(operation)
        assert await count(database, "kept") == await count(database, "kept too") == 1


@awaited
async def test_a_read_cannot_write(app_dsn: str) -> None:
    async def operation(conn: AsyncConnection[Any]) -> None:
        await conn.execute(ADD_COMPANY, ["x"])

    async with AsyncDatabase(app_dsn) as database:
        with as_service("test"):
            with pytest.raises(ReadOnlyError, match="use execute_write"):
                await database.execute_read(ADD_COMPANY, ["x"])
            with pytest.raises(ReadOnlyError):
                await database.execute_read(operation)
            assert await database.execute_write(ADD_COMPANY, ["x"]) == 1


# --- how a write ends ---------------------------------------------------------------------------------------------


@awaited
async def test_a_write_that_ends_badly_writes_nothing_and_says_why(app_dsn: str) -> None:
    async def raises(conn: AsyncConnection[Any]) -> None:
        await conn.execute(ADD_COMPANY, ["never"])
        raise KeyError("mine")

    async def swallows(conn: AsyncConnection[Any]) -> str:
        await conn.execute(ADD_COMPANY, ["never"])
        try:
            await conn.execute("SELECT 1 / 0")
        except psycopg.errors.DivisionByZero:
            return "fine"
        return "not reached"

    async def commits(conn: AsyncConnection[Any]) -> None:
        await conn.execute(ADD_COMPANY, ["never"])
        await conn.commit()

    async def rolls_back(conn: AsyncConnection[Any]) -> None:
        await conn.execute(ADD_COMPANY, ["never"])
        await conn.rollback()

    kept: list[Any] = []

    async def leaves_a_stream(conn: AsyncConnection[Any]) -> None:
        await conn.execute(ADD_COMPANY, ["never"])
        stream = conn.cursor().stream("SELECT generate_series(1, 100000)")
        await anext(stream)
        kept.append(stream)

    async def leaves_a_task(conn: AsyncConnection[Any]) -> None:
        await conn.execute(ADD_COMPANY, ["never"])
        kept.append(asyncio.ensure_future(conn.execute("SELECT pg_sleep(60)")))
        await asyncio.sleep(0.1)

    expected: list[tuple[Any, type[Exception], str]] = [
        (raises, KeyError, "mine"),
        (swallows, SwallowedErrorError, "nothing was written"),
        (commits, OperationEndedTransactionError, "the library commits"),
        (rolls_back, OperationEndedTransactionError, "the library commits"),
        (leaves_a_stream, TransactionError, "still running"),
        (leaves_a_task, TransactionError, "still running"),
    ]
    async with AsyncDatabase(Settings(dsn=app_dsn, min_size=2, max_size=2)) as database:
        for operation, error, message in expected:
            with as_service("test"), pytest.raises(error, match=message):
                await database.execute_write(operation)
            assert await count(database, "never") == 0
        stream, task = kept
        await stream.aclose()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], psycopg.OperationalError)
        assert next(iter(database.pool.get_stats().values()))["in_use"] == 0


@awaited
async def test_what_runs_before_commit_runs_in_the_same_transaction(app_dsn: str) -> None:
    attempts: list[dict[Any, Any]] = []

    async def ride(conn: Any) -> None:
        await conn.execute(ADD_COMPANY, ["rider"])

    async def operation(conn: AsyncConnection[Any]) -> None:
        transaction = current_transaction()
        assert transaction is not None
        assert id(transaction.connection) == id(conn)
        transaction.local["seen"] = True
        attempts.append(transaction.local)
        transaction.before_commit(ride)  # type: ignore[arg-type]
        await conn.execute(ADD_COMPANY, ["driver"])
        if len(attempts) == 1:
            await conn.execute(fail("40001"))

    async def doom(conn: Any) -> None:
        await conn.execute("SELECT 1 / 0")

    async def fails(conn: AsyncConnection[Any]) -> None:
        await conn.execute(ADD_COMPANY, ["doomed"])
        transaction = current_transaction()
        assert transaction is not None
        transaction.before_commit(doom)  # type: ignore[arg-type]

    async with AsyncDatabase(app_dsn) as database:
        with as_service("test"):
            await database.execute_write(operation)
            assert len(attempts) == 2
            assert await count(database, "driver") == await count(database, "rider") == 1
            assert current_transaction() is None
            with pytest.raises(psycopg.errors.DivisionByZero):
                await database.execute_write(fails)
            assert await count(database, "doomed") == 0


# --- the audit log ------------------------------------------------------------------------------------------------


async def logged(database: AsyncDatabase) -> list[str]:
    with as_service("look"):
        return sorted(str(record.entity_id) for record in await database.audit.query(source="sdk", limit=1000))


@awaited
async def test_audit_events_share_the_fate_of_their_transaction_and_of_their_savepoint(app_dsn: str) -> None:
    async with AsyncDatabase(app_dsn) as database:
        log = functools.partial(database.audit.log, AuditAction.APPROVE, "deal")

        async def operation(conn: AsyncConnection[Any], end: str) -> None:
            log("first")
            async with conn.transaction():
                log("in savepoint")
                async with conn.transaction():
                    log("nested")
            with contextlib.suppress(KeyError):
                async with conn.transaction():
                    log("rolled back")
                    async with conn.transaction():
                        log("rolled back inside")
                    raise KeyError
            async with conn.transaction(force_rollback=True):
                log("never meant to stay")
            await conn.execute("SELECT 1")
            for number in range(250):
                log(number)
            if end == "flush":
                await database.audit.flush()
                cursor = await conn.execute("SELECT count(*) FROM public.audit_logs")
                assert await cursor.fetchone() == (253,)
            if end == "fail":
                raise ZeroDivisionError

        with as_service("test"):
            with pytest.raises(ZeroDivisionError):
                await database.execute_write(functools.partial(operation, end="fail"))
            assert await logged(database) == []
            await database.execute_write(functools.partial(operation, end=""))
            expected = sorted(["first", "in savepoint", "nested", *map(str, range(250))])
            assert await logged(database) == expected
            with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(uuid4()):
                await database.execute_write(functools.partial(operation, end="flush"))
            assert await logged(database) == expected


@awaited
async def test_audit_events_outside_transactions_are_queued_and_flushed(app_dsn: str) -> None:
    async with AsyncDatabase(app_dsn) as database:
        with as_service("test"):

            @database.audit.with_audit(AuditAction.EXPORT, "report", lambda name: name)
            async def export(name: str) -> str:
                await asyncio.sleep(0)
                return name

            assert await export("decorated") == "decorated"
            database.audit.log(AuditAction.LOGIN, "user", "7")
            await database.audit.flush()
            assert await logged(database) == ["7", "decorated"]
            database.audit.log(AuditAction.LOGIN, "user", "at close")
    async with AsyncDatabase(app_dsn) as database:
        assert await logged(database) == ["7", "at close", "decorated"]


@awaited
async def test_a_full_audit_queue_does_not_block_the_event_loop(app_dsn: str) -> None:
    from equitie_data._async_audit import AsyncAuditLogger

    async with AsyncDatabase(Settings(dsn=app_dsn, enable_audit_logging=True)) as database:
        audit = AsyncAuditLogger(database._from_thread, capacity=100)
        with as_service("test"):
            for number in range(100):
                audit.log(AuditAction.LOGIN, "user", number)
            with pytest.raises(UnavailableError, match=r"await audit.flush\(\)"):
                audit.log(AuditAction.LOGIN, "user", 100)
            await audit.flush()
            audit.log(AuditAction.LOGIN, "user", 100)
            await audit.flush()
            assert len(await logged(database)) == 101


@awaited
async def test_the_monitor_stores_what_it_measured(app_dsn: str, owner_dsn: str) -> None:
    async with AsyncDatabase(app_dsn) as database:
        with as_service("test"):
            for _ in range(7):
                await database.execute_read("SELECT 'measured'")
        assert await asyncio.to_thread(database.monitor.flush) is True
        assert database.monitor.stats().flushed == 7
        # In the event loop it could only wait for itself.
        assert database.monitor.flush() is True
        with as_service("test"):
            await database.execute_read("SELECT 'measured'")
        assert database.monitor.flush() is False
    with psycopg.connect(owner_dsn) as owner:
        assert owner.execute("SELECT sum(calls) FROM public.query_stats").fetchone() == (8,)


# --- retries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "attempts"), [("40001", 4), ("40P01", 4), ("23505", 1), ("57014", 1)])
@awaited
async def test_a_transient_error_is_retried_and_any_other_is_not(app_dsn: str, state: str, attempts: int) -> None:
    runs: list[int] = []

    async def operation(conn: AsyncConnection[Any]) -> None:
        runs.append(1)
        await conn.execute(fail(state))

    listener = Listener()
    async with AsyncDatabase(app_dsn, hooks=[listener]) as database:
        with as_service("test"):
            with pytest.raises(psycopg.Error) as caught:
                await database.execute_write(operation)
            assert caught.value.sqlstate == state
            assert len(runs) == attempts
            assert len(listener.of(Retried)) == attempts - 1
            assert listener.of(OperationEnded)[0].attempts == attempts
            with pytest.raises(psycopg.Error):
                await database.execute_write(operation, retry=False)
            assert len(runs) == attempts + 1


@awaited
async def test_a_backend_killed_in_mid_operation_costs_no_failed_call_and_no_double(
    app_dsn: str, owner_dsn: str
) -> None:
    pids: list[int] = []

    async def operation(conn: AsyncConnection[Any]) -> int:
        await conn.execute(ADD_COMPANY, ["once"])
        pids.append(conn.info.backend_pid)
        if len(pids) == 1:
            async with await psycopg.AsyncConnection.connect(owner_dsn, autocommit=True) as owner:
                await owner.execute("SELECT pg_terminate_backend(%s, 5000)", pids)
        return int((await (await conn.execute(COUNT_COMPANIES, ["once"])).fetchone())[0])  # type: ignore[index]

    async with AsyncDatabase(app_dsn) as database:
        with as_service("test"):
            assert await database.execute_write(operation) == 1
        assert len(set(pids)) == 2
        assert await count(database, "once") == 1


@awaited
async def test_idle_connections_that_the_server_closed_cost_no_failed_call(app_dsn: str, owner_dsn: str) -> None:
    listener = Listener()
    async with AsyncDatabase(Settings(dsn=app_dsn, min_size=5, max_size=5), hooks=[listener]) as database:
        with as_service("hold"):
            pids = await together(database, 5)
            with psycopg.connect(owner_dsn, autocommit=True) as owner:
                for pid in pids:
                    owner.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
            for _ in range(20):
                assert await database.execute_read("SELECT 1") == [(1,)]
            assert listener.of(Retried) == []


async def together(database: AsyncDatabase, tasks: int) -> set[int]:
    """Have so many tasks hold a connection at once, and return the backends' process ids."""
    arrived, everybody = [], asyncio.Event()

    async def hold(conn: AsyncConnection[Any]) -> int:
        await conn.execute("SELECT 1")
        arrived.append(1)
        if len(arrived) == tasks:
            everybody.set()
        await everybody.wait()
        return conn.info.backend_pid

    return set(await asyncio.gather(*(database.execute_read(hold) for _ in range(tasks))))


# --- time ---------------------------------------------------------------------------------------------------------


@awaited
async def test_timeout_bounds_a_statement_on_the_server(app_dsn: str) -> None:
    async with AsyncDatabase(app_dsn) as database:
        with as_service("test"):
            for operation in ("SELECT pg_sleep(30)", lambda conn: conn.execute("SELECT pg_sleep(30)")):
                with pytest.raises(psycopg.errors.QueryCanceled):
                    await database.execute_read(operation, timeout=0.2)
            setting = "SELECT current_setting('statement_timeout')"
            assert await database.execute_read(setting) == [("1min",)]
            assert await database.execute_read(setting, timeout=math.inf) == [("0",)]


@awaited
async def test_a_pool_in_use_says_so_and_names_the_task(app_dsn: str) -> None:
    async with AsyncDatabase(Settings(dsn=app_dsn, min_size=1, max_size=1, checkout_timeout=0.3)) as database:

        async def nested(conn: AsyncConnection[Any]) -> None:
            await conn.execute("SELECT 1")
            await database.execute_read("SELECT 1")

        async def work() -> None:
            await database.execute_write(nested, name="outer")

        with as_service("test"):
            with pytest.raises(
                CheckoutTimeoutError, match=r"Held longest: greedy in 'outer' for .* at test_aio.py:\d+"
            ):
                await asyncio.create_task(work(), name="greedy")
            assert await database.execute_read("SELECT 1") == [(1,)]


@awaited
async def test_a_connection_held_too_long_is_reported_with_the_place(app_dsn: str) -> None:
    listener = Listener()
    async with AsyncDatabase(Settings(dsn=app_dsn, leak_threshold=0.1), hooks=[listener]) as database:

        async def dawdle(conn: AsyncConnection[Any]) -> None:
            for _ in range(200):
                await asyncio.sleep(0.05)  # here
                if listener.of(Leaked):
                    return

        with as_service("test"):
            await database.execute_read(dawdle, name="slow")
    leaked = listener.of(Leaked)[0]
    line = dawdle.__code__.co_firstlineno + 2
    assert (leaked.name, leaked.site) == ("slow", f"test_aio.py:{line}")


@awaited
async def test_the_event_loop_goes_on_while_calls_wait(app_dsn: str) -> None:
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(0.001)
            longest, last = max(longest, loop.time() - last), loop.time()

    async with AsyncDatabase(Settings(dsn=app_dsn, min_size=1, max_size=1)) as database:
        ticking = asyncio.create_task(tick())
        with as_service("test"):
            await asyncio.gather(*(database.execute_read("SELECT pg_sleep(0.7)") for _ in range(3)))
        ticking.cancel()
    # One sleeps, two wait for the connection, for two seconds in all: whoever blocked would have blocked for 0.7 s.
    assert longest < 0.6


# --- life ---------------------------------------------------------------------------------------------------------


@awaited
async def test_a_database_that_is_not_open_says_so(app_dsn: str) -> None:
    database = AsyncDatabase(app_dsn)
    with as_service("test"):
        with pytest.raises(NotOpenError, match="async with"):
            await database.execute_read("SELECT 1")
        for _ in range(2):
            async with database:
                assert await database.execute_read("SELECT 1") == [(1,)]
                assert "open" in repr(database)
            with pytest.raises(NotOpenError):
                await database.execute_read("SELECT 1")
        await asyncio.gather(database.open(), database.open())
        assert await database.execute_read("SELECT 1") == [(1,)]
        await asyncio.gather(database.close(), database.close())
    with pytest.raises(ConfigurationError):
        AsyncDatabase(7)  # type: ignore[arg-type]


def test_a_database_belongs_to_one_event_loop(app_dsn: str) -> None:
    database = AsyncDatabase(app_dsn)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(database.open())
        with as_service("test"), pytest.raises(NotOpenError, match="another event loop"):
            asyncio.run(database.execute_read("SELECT 1"))
        # A thread that would wait for a loop that does not run.
        with as_service("test"):
            database.audit.log(AuditAction.LOGIN, "user", 1)
        with pytest.raises(NotOpenError, match="has ended"):
            database.audit._queue.flush(None)
        loop.run_until_complete(database.close())
        assert database.audit.stats().queued == 0
    finally:
        loop.close()


@awaited
async def test_close_lets_calls_under_way_finish(app_dsn: str) -> None:
    database = AsyncDatabase(app_dsn)
    await database.open()
    running = asyncio.Event()

    async def slow(conn: AsyncConnection[Any]) -> str:
        running.set()
        await conn.execute("SELECT pg_sleep(0.3)")
        return "finished"

    with as_service("test"):
        call = asyncio.create_task(database.execute_write(slow))
    await running.wait()
    await database.close()
    assert await call == "finished"


@awaited
async def test_an_embedded_database_starts_when_opened_and_stops_when_closed() -> None:
    database = AsyncDatabase.embedded(max_size=2)
    assert not database.owner_dsn
    async with database:
        assert database.owner_dsn is not None
        with as_service("test"):
            assert await database.execute_write(ADD_COMPANY, ["mine"]) == 1
        server = database._server
        assert server is not None
        running = server.is_running
    assert (running, server.is_running) == (True, False)
    assert database.owner_dsn is None


@awaited
async def test_from_env(app_dsn: str) -> None:
    async with AsyncDatabase.from_env({"DATABASE_URL": app_dsn}) as database:
        with as_service("test"):
            assert await database.execute_read("SELECT 1") == [(1,)]


@awaited
async def test_every_statement_is_reported_without_its_parameters(app_dsn: str) -> None:
    secret = f"secret-{uuid4()}"
    listener = Listener()

    async def operation(conn: AsyncConnection[Any]) -> None:
        await conn.execute(COUNT_COMPANIES, [secret])
        await conn.cursor().executemany(ADD_COMPANY, [(f"{secret}{n}",) for n in range(3)])
        async with conn.cursor().copy("COPY public.companies_clean (company_name) FROM STDIN") as copy:
            await copy.write_row((secret + "x",))
        assert len([row async for row in conn.cursor().stream("SELECT generate_series(1, 4)")]) == 4
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with conn.transaction():
                await conn.execute(ADD_COMPANY, [secret])

    async with AsyncDatabase(app_dsn, hooks=[listener]) as database:
        with as_service("test"):
            await database.execute_write(ADD_COMPANY, [secret], name="add")
            await database.execute_write(operation, name="many")
    ended = [event for event in listener.of(StatementEnded) if event.name in ("add", "many")]
    assert [(event.rows, event.sqlstate) for event in ended] == [
        (1, None),
        (1, None),
        (3, None),
        (1, None),
        (4, None),
        (None, "23505"),
    ]
    assert [event.name for event in listener.of(OperationStarted) if event.actor.reason == "test"] == ["add", "many"]
    assert secret not in repr(listener.events)


# --- replicas -----------------------------------------------------------------------------------------------------


@awaited
async def test_reads_go_to_replicas_see_the_session_s_writes_and_survive_a_dead_one() -> None:
    listener = Listener()
    port = "SELECT current_setting('port')::int"
    mine = "SELECT count(*) FROM public.companies_clean WHERE company_name = 'mine'"
    with EmbeddedServer() as primary:
        app_dsn = await asyncio.to_thread(provision, primary)
        with primary.replica() as one, primary.replica() as two:
            settings = Settings(
                dsn=app_dsn,
                replicas=[app_dsn.replace(f":{primary.port}/", f":{replica.port}/") for replica in (one, two)],
                max_size=3,
                health_check_interval=0.2,
            )
            async with AsyncDatabase(settings, hooks=[listener]) as database:
                with as_service("test"):
                    # Each in a context of its own, so that none has anything to wait for.
                    tasks = [
                        asyncio.create_task(database.execute_read(port, consistency="eventual")) for _ in range(40)
                    ]
                    seen = Counter(rows[0][0] for rows in await asyncio.gather(*tasks))
                    assert seen == {one.port: 20, two.port: 20}
                    for number in range(1, 6):
                        await database.execute_write(ADD_COMPANY.replace("%s", "'mine'"), timeout=20.0)
                        assert await database.execute_read(mine) == [(1,)]
                        await database.execute_write("DELETE FROM public.companies_clean WHERE company_name = 'mine'")
                        assert await database.execute_read(mine) == [(0,)], number
                    assert session_token() is not None
                    await asyncio.to_thread(one.kill)
                    for _ in range(40):
                        await database.execute_read(port, consistency="eventual")
                    while not listener.of(NodeEjected):
                        await asyncio.sleep(0.05)
                    await asyncio.to_thread(two.kill)
                    for _ in range(20):
                        tasks = [
                            asyncio.create_task(database.execute_read(port, consistency="eventual")) for _ in range(5)
                        ]
                        assert {rows[0][0] for rows in await asyncio.gather(*tasks)} == {primary.port}
    assert all(event.error is None for event in listener.of(OperationEnded))
