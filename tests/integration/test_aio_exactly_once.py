"""Lost replies and repeated keys under asyncio, and calls cancelled at every moment."""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from equitie_data import AsyncDatabase, AuditAction, CommitOutcomeUnknown, Settings, as_service
from equitie_data.errors import ResultLostError
from equitie_data.hooks import CommitResolved, OperationEnded
from equitie_data.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator

    from psycopg import AsyncConnection

ADD = "INSERT INTO public.companies_clean (company_name) VALUES (%s)"
COUNT = "SELECT count(*) FROM public.companies_clean WHERE company_name = %s"


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
        with as_service("test"):
            asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture
def proxy(app_dsn: str) -> Iterator[TcpProxy]:
    with TcpProxy(app_dsn) as proxy:
        yield proxy


@pytest.fixture
def listener() -> Listener:
    return Listener()


def quiet(dsn: str, listener: Listener | None = None, **settings: Any) -> AsyncDatabase:
    """A database that nobody uses but the test."""
    chosen = Settings(dsn=dsn, enable_performance_monitoring=False, **{"max_size": 5, **settings})
    return AsyncDatabase(chosen, hooks=[] if listener is None else [listener])


async def set_distance(database: AsyncDatabase, seconds: float) -> None:
    """Have the library believe that a trip takes so long; below 0.2 ms writes take two trips."""
    await asyncio.to_thread(database.pool._health.stop, 5)
    database.pool.primary.round_trip = seconds


def rows(owner_dsn: str, name: str) -> int:
    with psycopg.connect(owner_dsn) as owner:
        return int(owner.execute(COUNT, [name]).fetchone()[0])  # type: ignore[index]


async def add(conn: AsyncConnection[Any], name: str) -> int:
    return (await conn.execute(ADD, [name])).rowcount


# --- trips --------------------------------------------------------------------------------------------------------


async def trips(proxy: TcpProxy, call: Callable[[], Coroutine[Any, Any, Any]]) -> int:
    for _ in range(8):  # connections made, statements prepared
        await call()
    before = proxy.round_trips
    for _ in range(10):
        await call()
    return (proxy.round_trips - before) // 10


@awaited
async def test_a_statement_takes_one_trip_and_a_callable_two(proxy: TcpProxy) -> None:
    update = "UPDATE public.companies_clean SET company_sector = 'x' WHERE company_id = 0"

    async def operation(conn: AsyncConnection[Any]) -> None:
        await conn.execute(update)

    async with quiet(proxy.dsn) as database:
        await set_distance(database, 0.001)
        assert await trips(proxy, lambda: database.execute_read("SELECT %s::int", [1])) == 1
        assert await trips(proxy, lambda: database.execute_write(update)) == 1
        assert await trips(proxy, lambda: database.execute_write(operation)) == 2


# --- lost replies -------------------------------------------------------------------------------------------------


@awaited
async def test_a_lost_reply_to_commit_is_resolved_and_the_result_returned(
    proxy: TcpProxy, listener: Listener, owner_dsn: str
) -> None:
    async with quiet(proxy.dsn, listener) as database:
        await database.execute_write("SELECT 1")
        proxy.cut_reply_to(b"COMMIT")
        assert await database.execute_write(functools.partial(add, name="a")) == 1
        await set_distance(database, 0.0)
        proxy.cut_reply_to(b"COMMIT")
        assert await database.execute_write(ADD + " RETURNING company_name", ["b"]) == [("b",)]
    assert [event.outcome for event in listener.of(CommitResolved)] == ["committed", "committed"]
    assert rows(owner_dsn, "a") == rows(owner_dsn, "b") == 1


@awaited
async def test_a_commit_that_never_arrived_is_run_again(proxy: TcpProxy, listener: Listener, owner_dsn: str) -> None:
    runs: list[int] = []

    async def operation(conn: AsyncConnection[Any]) -> str:
        runs.append(conn.info.backend_pid)
        await add(conn, "c")
        if len(runs) == 1:
            async with await psycopg.AsyncConnection.connect(owner_dsn, autocommit=True) as owner:
                await owner.execute("SELECT pg_terminate_backend(%s, 5000)", runs)
        return "done"

    async with quiet(proxy.dsn, listener) as database:
        assert await database.execute_write(operation) == "done"
    assert len(runs) == 2
    assert [event.outcome for event in listener.of(CommitResolved)] == ["aborted"]
    assert rows(owner_dsn, "c") == 1


@awaited
async def test_a_statement_in_one_trip_whose_reply_is_lost_says_that_it_is_committed(
    proxy: TcpProxy, owner_dsn: str
) -> None:
    async with quiet(proxy.dsn) as database:
        await set_distance(database, 0.001)
        proxy.cut_reply_to(b"INSERT INTO public.companies_clean")
        with pytest.raises(ResultLostError, match="is committed"):
            await database.execute_write(ADD, ["d"])
    assert rows(owner_dsn, "d") == 1


@awaited
async def test_an_outcome_nobody_knows_is_reported_unknown(
    proxy: TcpProxy, owner_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equitie_data import resolve

    monkeypatch.setattr(resolve, "_STATUS", "SELECT NULL::text WHERE %s::text IS NOT NULL")
    async with quiet(proxy.dsn) as database:
        proxy.cut_reply_to(b"COMMIT")
        with pytest.raises(CommitOutcomeUnknown, match="look for what it would have written"):
            await database.execute_write(functools.partial(add, name="f"), timeout=2.0)
    assert rows(owner_dsn, "f") == 1


# --- keys ---------------------------------------------------------------------------------------------------------


@awaited
async def test_sixteen_tasks_with_one_key_run_once(app_dsn: str, owner_dsn: str) -> None:
    runs: list[int] = []

    async def operation(conn: AsyncConnection[Any]) -> tuple[Decimal, str]:
        runs.append(1)
        await add(conn, "burst")
        await conn.execute("SELECT pg_sleep(0.1)")
        return Decimal("1.50"), "first"

    async with quiet(app_dsn, max_size=16) as database:
        key = f"burst-{uuid4()}"
        calls = [database.execute_write(operation, idempotency_key=key) for _ in range(16)]
        assert await asyncio.gather(*calls) == [(Decimal("1.50"), "first")] * 16
    assert len(runs) == 1
    assert rows(owner_dsn, "burst") == 1


@awaited
async def test_a_lost_reply_of_a_keyed_write_returns_the_kept_result(
    proxy: TcpProxy, listener: Listener, owner_dsn: str
) -> None:
    runs: list[int] = []

    async def operation(conn: AsyncConnection[Any]) -> str:
        runs.append(1)
        await add(conn, "lost")
        return "kept"

    async with quiet(proxy.dsn, listener) as database:
        proxy.cut_reply_to(b"COMMIT")
        assert await database.execute_write(operation, idempotency_key="lost") == "kept"
        assert await database.execute_write(operation, idempotency_key="lost") == "kept"
    assert len(runs) == 1
    assert [event.error for event in listener.of(OperationEnded)] == [None, None]
    assert rows(owner_dsn, "lost") == 1


# --- cancellation -------------------------------------------------------------------------------------------------


class Suspensions:
    """Awaits a coroutine, counts where it is suspended, and cancels its task at chosen ones.

    Args:
        coroutine: What to await.
        at: The suspensions to cancel at, from 1.
        after: Seconds after the suspension; by default as soon as the loop has looked at it.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: set[int], after: float | None = None) -> None:
        self.coroutine = coroutine
        self.at = at
        self.after = after
        self.count = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        thrown: BaseException | None = None
        while True:
            try:
                future = self.coroutine.send(None) if thrown is None else self.coroutine.throw(thrown)
            except StopIteration as stop:
                return stop.value
            thrown = None
            self.count += 1
            if self.count in self.at:
                if self.after is None:
                    loop.call_soon(task.cancel)
                else:
                    loop.call_later(self.after, task.cancel)
            try:
                yield future
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's
                thrown = error


async def cancelled_at(
    coroutine: Coroutine[Any, Any, Any], at: set[int], after: float | None = None
) -> tuple[str, int]:
    """Return how a call that was cancelled there ended, and how often it was suspended."""
    suspensions = Suspensions(coroutine, at, after)

    async def run() -> Any:
        return await suspensions

    task = asyncio.create_task(run())
    await asyncio.wait({task})
    if task.cancelled():
        return "cancelled", suspensions.count
    error = task.exception()
    assert error is None, error
    return "returned", suspensions.count


async def check_unharmed(database: AsyncDatabase, tasks: int) -> None:
    """Make sure that no connection is missing, and that every one works and is nobody's."""
    # gather() ends with the first of its calls that is cancelled; another may still be giving its connection back.
    for _ in range(1000):
        stats = next(iter(database.pool.get_stats().values()))
        if (stats["in_use"], stats["waiting"]) == (0, 0):
            break
        await asyncio.sleep(0.01)
    assert (stats["in_use"], stats["waiting"]) == (0, 0)
    assert stats["size"] <= tasks
    arrived, everybody = [], asyncio.Event()

    async def hold(conn: AsyncConnection[Any]) -> Any:
        row = await (
            await conn.execute("SELECT current_setting('role'), current_setting('statement_timeout')")
        ).fetchone()
        arrived.append(1)
        if len(arrived) == tasks:
            everybody.set()
        await everybody.wait()
        return row

    held = await asyncio.gather(*(database.execute_read(hold, timeout=20.0) for _ in range(tasks)))
    assert held == [("service_role", "20s")] * tasks


async def _statements(conn: AsyncConnection[Any], database: AsyncDatabase, name: str) -> None:
    for part in range(3):
        await add(conn, f"{name} {part}")
    await add(conn, name)


async def _savepoints(conn: AsyncConnection[Any], database: AsyncDatabase, name: str) -> None:
    async with conn.transaction():
        database.audit.log(AuditAction.CREATE, "company", name)
        async with conn.transaction():
            await add(conn, name)
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with conn.transaction():
                await add(conn, name)
    database.audit.log(AuditAction.CREATE, "company", name)


async def _copies(conn: AsyncConnection[Any], database: AsyncDatabase, name: str) -> None:
    async with conn.cursor().copy("COPY public.companies_clean (company_name) FROM STDIN") as copy:
        await copy.write_row((name,))
    async with conn.cursor().copy("COPY (SELECT generate_series(1, 50000)) TO STDOUT") as out:
        async for _ in out:
            pass


async def _streams(conn: AsyncConnection[Any], database: AsyncDatabase, name: str) -> None:
    async for _ in conn.cursor().stream("SELECT repeat('x', 10000) FROM generate_series(1, 300)"):
        pass
    async with conn.cursor(name="c") as cursor:
        await cursor.execute("SELECT generate_series(1, 5)")
        assert len(await cursor.fetchmany(3)) == 3
    await add(conn, name)


async def _pipelines(conn: AsyncConnection[Any], database: AsyncDatabase, name: str) -> None:
    async with conn.pipeline() as pipeline:
        await conn.execute("SELECT 1")
        await pipeline.sync()
        await conn.execute(ADD, [name])
    await conn.cursor().executemany("SELECT %s::int", [(1,), (2,)])


async def _nested(conn: AsyncConnection[Any], database: AsyncDatabase, name: str) -> None:
    await add(conn, name)
    assert await database.execute_read("SELECT pg_sleep(0.001)") == [("",)]
    await asyncio.gather(asyncio.sleep(0), database.execute_read("SELECT 1"))


def sample(count: int) -> list[int]:
    """All suspensions, or the first, the last and some of those in between."""
    return [point for point in range(1, count + 1) if point <= 20 or point > count - 20 or point % (count // 20) == 0]


WORK = [_statements, _savepoints, _copies, _streams, _pipelines, _nested]


# A server-side cursor whose closing was interrupted warns when it is collected.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.parametrize("work", [None, *WORK])
@pytest.mark.parametrize("how", ["at once", "a little later", "twice", "keyed"])
@awaited
async def test_a_write_cancelled_anywhere_leaves_what_it_says_and_no_trace_on_the_connections(
    app_dsn: str, owner_dsn: str, listener: Listener, work: Any, how: str
) -> None:
    async with quiet(app_dsn, listener, min_size=3, max_size=3, leak_threshold=3600.0) as database:
        await set_distance(database, 0.0 if how == "a little later" else 0.001)
        await check_unharmed(database, 3)
        endings: set[tuple[str, int]] = set()
        expected: dict[str, int] = {}
        points = [0]  # never: the first run counts
        for point in points:
            name = f"{how} {point}"
            key = name if how == "keyed" else None
            call = (
                database.execute_write(ADD, [name], name=name, idempotency_key=key)
                if work is None
                else database.execute_write(
                    functools.partial(work, database=database, name=name), name=name, idempotency_key=key
                )
            )
            at = set(range(point, point + 3)) if how == "twice" and point else {point}
            ending, suspended = await cancelled_at(call, at, 0.0005 if how == "a little later" else None)
            if point == 0:
                points += sample(suspended)
            (ended,) = [event for event in listener.of(OperationEnded) if event.name == name]
            expected[name] = int(ended.error is None)
            if ending == "returned":
                assert expected[name] == 1
            endings.add((ending, expected[name]))
        await check_unharmed(database, 3)
        with psycopg.connect(owner_dsn) as owner:
            found = {row[0] for row in owner.execute("SELECT company_name FROM public.companies_clean")}
            assert {name: int(name in found) for name in expected} == expected
            events = owner.execute("SELECT entity_id, count(*) FROM public.audit_logs WHERE source = 'sdk' GROUP BY 1")
            assert dict(events.fetchall()) == {
                name: 2 for name, written in expected.items() if written and work is _savepoints
            }
    assert ("returned", 1) in endings
    assert ("cancelled", 0) in endings or work is None or how == "a little later"
    assert len(points) > 2
    gc.collect()  # so that nobody else is warned


@awaited
async def test_a_read_cancelled_anywhere_leaves_no_trace(app_dsn: str) -> None:
    async def operation(conn: AsyncConnection[Any]) -> None:
        await conn.execute("SELECT 1")
        await conn.execute("SELECT pg_sleep(0.01)")

    async with quiet(app_dsn, min_size=1, max_size=3) as database:
        for call in (lambda: database.execute_read(operation), lambda: database.execute_read("SELECT pg_sleep(0.01)")):
            point, last = 1, 1
            while point <= last:
                _, count = await cancelled_at(call(), {point})
                last = max(last, count)
                point += 1
        await check_unharmed(database, 3)


@awaited
async def test_tasks_cancelled_while_they_wait_for_a_connection_lose_none(app_dsn: str) -> None:
    async with quiet(app_dsn, min_size=2, max_size=2) as database:
        for round_ in range(30):
            tasks = [asyncio.create_task(database.execute_read("SELECT pg_sleep(0.002)")) for _ in range(12)]
            await asyncio.sleep(round_ / 5000)
            for task in tasks[:: 1 + round_ % 3]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, list | asyncio.CancelledError) for result in results)
        await check_unharmed(database, 2)


@awaited
async def test_a_cancelled_statement_ends_on_the_server_too(app_dsn: str, owner_dsn: str) -> None:
    async with quiet(app_dsn, min_size=1, max_size=1) as database:
        for distance in (0.0, 0.001):
            await set_distance(database, distance)
            for call in (database.execute_read, database.execute_write):
                task = asyncio.create_task(call("SELECT pg_sleep(100)"))
                with psycopg.connect(owner_dsn, autocommit=True) as owner:
                    active = "SELECT count(*) FROM pg_stat_activity WHERE query ~ 'pg_sleep.100' AND state = 'active'"
                    active += " AND pid <> pg_backend_pid()"
                    while owner.execute(active).fetchone() != (1,):
                        await asyncio.sleep(0.01)
                    task.cancel()
                    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
                    while owner.execute(active).fetchone() != (0,):
                        await asyncio.sleep(0.01)
                assert await database.execute_read("SELECT 1") == [(1,)]
        assert next(iter(database.pool.get_stats().values()))["discarded"] == 0


@pytest.mark.parametrize("form", ["operation", "statement", "keyed", "one trip"])
@awaited
async def test_a_cancellation_waits_until_a_lost_commit_is_resolved(
    proxy: TcpProxy, listener: Listener, owner_dsn: str, form: str
) -> None:
    async with quiet(proxy.dsn, listener) as database:
        await set_distance(database, 0.001 if form == "one trip" else 0.0)
        for _ in range(3):
            await database.execute_write("SELECT 1", name="before")
        runs: list[int] = []

        async def operation(conn: AsyncConnection[Any]) -> None:
            runs.append(1)
            await add(conn, form)

        sent, cut = proxy.round_trips, b"INSERT INTO" if form == "one trip" else b"COMMIT"
        proxy.cut_reply_to(cut)
        call = (
            database.execute_write(operation, name="lost", idempotency_key="lost" if form == "keyed" else None)
            if form in ("operation", "keyed")
            else database.execute_write(ADD, [form], name="lost")
        )
        task = asyncio.create_task(call)
        while not (listener.of(CommitResolved) or rows(owner_dsn, form)):
            await asyncio.sleep(0.001)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.001)
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        ended = [event for event in listener.of(OperationEnded) if event.name == "lost"]
        assert isinstance(result, asyncio.CancelledError) or ended[0].error is None
        if form == "one trip":
            assert [event.error for event in ended] in (["ResultLostError"], [None])
        else:
            assert [event.error for event in ended] == [None]
        assert {event.outcome for event in listener.of(CommitResolved)} <= {"committed"}
        assert rows(owner_dsn, form) == 1
        assert sent <= proxy.round_trips
        assert await database.execute_read("SELECT 1") == [(1,)]


@pytest.mark.parametrize("silent", ["to COMMIT", "to whoever asks what became of it", "to whoever runs it again"])
@awaited
async def test_a_cancelled_call_does_not_wait_for_ever_for_an_answer(
    proxy: TcpProxy, listener: Listener, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    from equitie_data import _async_call, _async_nodes

    again = silent == "to whoever runs it again"
    monkeypatch.setattr(_async_call, "_ANSWER_WITHIN", 3.0 if again else 0.5)
    monkeypatch.setattr(_async_nodes, "_UNREACHABLE_AFTER", 0.2)
    async with quiet(proxy.dsn, listener, min_size=1, max_size=1, call_timeout=3600.0) as database:
        await set_distance(database, 0.001 if again else 0.0)
        await database.execute_write("SELECT 1", name="before")
        if silent != "to COMMIT":
            proxy.cut_reply_to(b"INSERT INTO" if again else b"COMMIT", proxy.go_deaf)

        async def operation(conn: AsyncConnection[Any]) -> None:
            await add(conn, "silence")
            if silent == "to COMMIT":
                proxy.go_deaf()

        call = (
            database.execute_write(ADD, ["silence"], name="lost")
            if again
            else database.execute_write(operation, name="lost")
        )
        task = asyncio.create_task(call)
        while proxy._hearing.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
        ended = [event for event in listener.of(OperationEnded) if event.name == "lost"]
        assert [event.error for event in ended] == ["CommitOutcomeUnknown"]
        proxy.hear()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout is new in 3.11")
@awaited
async def test_timeouts_and_task_groups_of_asyncio_work(app_dsn: str) -> None:
    new: Any = asyncio  # checked for Python 3.10
    async with quiet(app_dsn, min_size=2, max_size=2) as database:
        for operation in ("SELECT pg_sleep(100)", lambda conn: conn.execute("SELECT pg_sleep(100)")):
            for call in (database.execute_read, database.execute_write):
                with pytest.raises(TimeoutError):
                    async with new.timeout(0.05):
                        await call(operation)
        assert new.current_task().cancelling() == 0

        async def fails() -> None:
            await asyncio.sleep(0.05)
            raise KeyError

        with pytest.raises(BaseException) as caught:  # noqa: PT012 - a group, whose class is new in 3.11
            async with new.TaskGroup() as group:
                group.create_task(database.execute_write("SELECT pg_sleep(100)"))
                group.create_task(fails())
        group_of: Any = caught.value
        assert [type(error) for error in group_of.exceptions] == [KeyError]
        await check_unharmed(database, 2)
