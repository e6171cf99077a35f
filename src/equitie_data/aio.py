"""`AsyncDatabase`: the same calls, awaited.

The executor is the blocking one's twin, written by ``tools/make_async.py``. What is here is what only asyncio has:
cancellation, and background threads that must not touch an event loop's connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data._async_audit import AsyncAuditLogger, FromThread
from equitie_data._async_pool import AsyncConnectionPools
from equitie_data._async_transactions import AsyncTransactions
from equitie_data._event_loop import Uninterrupted, in_thread
from equitie_data.alerts import Thresholds
from equitie_data.commit import Outcome
from equitie_data.context import remember_position
from equitie_data.credentials import in_loop
from equitie_data.errors import ConfigurationError, NotOpenError
from equitie_data.hooks import Hooks
from equitie_data.monitor import PerformanceMonitor
from equitie_data.redaction import DEFAULT
from equitie_data.resolve import resolve_commit
from equitie_data.settings import Settings
from equitie_data.verify import explain_no_primary, verified

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from equitie_data._async_call import AsyncCall
    from equitie_data._async_nodes import AsyncNode
    from equitie_data._async_wire import AsyncNodeConnection
    from equitie_data.alerts import Alert
    from equitie_data.embedded import EmbeddedServer
    from equitie_data.hooks import Hook
    from equitie_data.prologue import Prologue
    from equitie_data.redaction import Redaction
    from equitie_data.resolve import Evidence

__all__ = ["AsyncDatabase"]

_THREADS = 8  # that wait for connections of their own: lost commits to resolve, batches of audit and monitor to write
_POLL = 0.1  # seconds


class Pools(AsyncConnectionPools):
    """The pools in an event loop, whose calls can be cancelled at any moment.

    A cancellation waits while a connection is being given back, and from the moment a COMMIT is sent until it is known
    what became of it, at most 10 seconds.
    """

    async def open(self) -> None:
        """Start the pools and the health checks; does not wait for connections."""
        self.loop = asyncio.get_running_loop()
        self.executor = ThreadPoolExecutor(_THREADS, "equitie-aio")
        for node in self._nodes:
            node.loop, node.executor = self.loop, self.executor
        await super().open()

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Stop the health checks and close every connection; those in use close when they come back.

        Args:
            timeout: Seconds to wait for the pools' threads.
        """
        await super().shutdown(timeout)
        self.executor.shutdown(wait=False)

    def _open_after_fork(self) -> None:
        raise NotOpenError("The database is not open: use it in an `async with` block, or await open() first.")

    async def _run(self, call: AsyncCall) -> Any:
        if self._opened and asyncio.get_running_loop() is not self.loop:
            raise NotOpenError("The database was opened in another event loop: open one in every loop that uses one.")
        return await Uninterrupted(super()._run(call), call.must_be_answered, call.cancel)

    async def _attempt(self, call: AsyncCall) -> Any:
        if not call.in_doubt:
            return await super()._attempt(call)
        # Whoever is held back from cancelling must not catch what psycopg_pool's timeouts cancel: hence a task.
        attempt = asyncio.ensure_future(super()._attempt(call))
        try:
            while not attempt.done():
                await asyncio.wait({attempt}, timeout=_POLL)
        except asyncio.CancelledError:
            attempt.cancel()
            await Uninterrupted(asyncio.wait({attempt}))
            raise
        if call.seen is not None:
            remember_position(call.seen)
        return attempt.result()

    async def _run_alone(self, call: AsyncCall, connection: AsyncNodeConnection[Any], prologue: Prologue) -> Any:
        call.alone_on = connection if call.kind == "write" else None
        try:
            return await super()._run_alone(call, connection, prologue)
        finally:
            call.alone_on = None
            if call.cancelling is not None:
                await call.cancelling  # late, it would hit the connection's next statement

    async def _give_back(self, call: AsyncCall, node: AsyncNode, connection: AsyncNodeConnection[Any]) -> None:
        await Uninterrupted(super()._give_back(call, node, connection))

    async def _roll_back(self, connection: AsyncNodeConnection[Any] | None) -> None:
        if connection is not None and (connection.lock.locked() or connection.pgconn.pipeline_status):
            # Something else is still at it: a task the operation has left behind, a generator nobody has closed.
            await connection.close()
        await super()._roll_back(connection)

    async def _outcome_of(self, call: AsyncCall, evidence: Evidence) -> Outcome:
        while True:
            # One try at a time: a cancellation brings the deadline nearer.
            outcome = await in_thread(self.executor, resolve_commit, lambda: self.primary.dsn, evidence, 0.0)
            if outcome is not Outcome.UNKNOWN or self.loop.time() + _POLL >= call.deadline:
                return outcome
            await asyncio.sleep(_POLL)


async def _to_its_end(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await a coroutine; a cancellation waits until it has ended."""
    task = asyncio.ensure_future(coroutine)
    await Uninterrupted(asyncio.wait({task}))
    task.result()


class AsyncDatabase:
    """A PostgreSQL database of the platform, in an event loop: `Database` with its calls awaited.

    Use it as an async context manager, or await `open` and `close`, in the event loop that makes the calls.

    Args:
        dsn_or_settings: The primary's connection string, or everything that can be set.
        hooks: Subscribers to what happens (see `equitie_data.hooks`); called in the event loop, and in the threads that
            watch over nodes.
        redaction: What must not be written down, beyond what is built in; the audit log and the monitor obey it.
        thresholds: When the monitor raises an alert.
        alert_sinks: Called with every `Alert`, on the monitor's thread.

    Attributes:
        settings: What it was made with.
        pool: The pools of its nodes.
        audit: The application's own audit events, and the audit log read back.
        monitor: What its statements cost.
        transactions: Transactions by their ids.
        owner_dsn: The owner's connection string, of an embedded database that is open; ``None`` for all others.
    """

    def __init__(
        self,
        dsn_or_settings: str | Settings,
        *,
        hooks: Iterable[Hook] = (),
        redaction: Redaction | None = None,
        thresholds: Thresholds | None = None,
        alert_sinks: Iterable[Callable[[Alert], object]] = (),
    ) -> None:
        if isinstance(dsn_or_settings, Settings):
            self.settings = dsn_or_settings
        elif isinstance(dsn_or_settings, str):
            self.settings = Settings(dsn=dsn_or_settings)
        else:
            raise ConfigurationError("AsyncDatabase takes a connection string or Settings.")
        self.hooks = Hooks(hooks)
        self.redaction = DEFAULT if redaction is None else redaction
        self.owner_dsn: str | None = None
        self._data_dir: Path | str | None = None
        self._embedded = False
        self._server: EmbeddedServer | None = None
        self._opened = False
        self._life = asyncio.Lock()
        self.pool = Pools(self.settings, self.hooks)
        self.execute_read = self.pool.execute_read
        self.execute_write = self.pool.execute_write
        self.transactions = AsyncTransactions(self.pool.execute_read, self.pool.execute_write)
        self._from_thread = FromThread(self.pool)
        self.audit = AsyncAuditLogger(
            self._from_thread, enabled=self.settings.enable_audit_logging, redaction=self.redaction
        )
        self.monitor = PerformanceMonitor(
            execute_write=self._from_thread.execute_write,
            pool_stats=self.pool.get_stats,
            thresholds=Thresholds() if thresholds is None else thresholds,
            alert_sinks=tuple(alert_sinks),
            redaction=self.redaction,
        )

    def __repr__(self) -> str:
        return f"<AsyncDatabase {self.pool.primary.name} {'open' if self._opened else 'closed'}>"

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        hooks: Iterable[Hook] = (),
        redaction: Redaction | None = None,
        thresholds: Thresholds | None = None,
        alert_sinks: Iterable[Callable[[Alert], object]] = (),
    ) -> Self:
        """Make a database from environment variables (see `Settings.from_env`).

        Args:
            environ: The variables; those of the process when left out.
            hooks: As in `AsyncDatabase`; so are the other arguments.
            redaction: As in `AsyncDatabase`.
            thresholds: As in `AsyncDatabase`.
            alert_sinks: As in `AsyncDatabase`.

        Raises:
            ConfigurationError: A variable is wrong, unknown or missing.
        """
        return cls(
            Settings.from_env(environ),
            hooks=hooks,
            redaction=redaction,
            thresholds=thresholds,
            alert_sinks=alert_sinks,
        )

    @classmethod
    def embedded(
        cls,
        data_dir: Path | str | None = None,
        *,
        hooks: Iterable[Hook] = (),
        redaction: Redaction | None = None,
        thresholds: Thresholds | None = None,
        alert_sinks: Iterable[Callable[[Alert], object]] = (),
        **settings: Any,
    ) -> Self:
        """Make a database on a PostgreSQL server of its own, migrated and with a login role that owns nothing.

        The server starts when the database is opened and stops when it is closed.

        Args:
            data_dir: Where its data is kept; a temporary directory when left out.
            hooks: As in `AsyncDatabase`; so are the next three.
            redaction: As in `AsyncDatabase`.
            thresholds: As in `AsyncDatabase`.
            alert_sinks: As in `AsyncDatabase`.
            settings: Attributes of `Settings` other than ``dsn``.
        """
        database = cls(
            Settings(dsn="dbname=equitie", **settings),
            hooks=hooks,
            redaction=redaction,
            thresholds=thresholds,
            alert_sinks=alert_sinks,
        )
        database._data_dir, database._embedded = data_dir, True
        return database

    async def open(self) -> Self:
        """Verify that the database can be used, then open the pools.

        Raises:
            UnavailableError: The primary cannot be reached; the message says why.
            NotMigratedError: Run ``python -m equitie_data.migrate`` first.
            HistoryTooNewError: A newer release has migrated it.
            EmbeddedServerError: No server binaries were found, or the server does not start.
        """
        await _to_its_end(self._open())
        return self

    async def _open(self) -> None:
        async with self._life:
            if self._opened:
                return
            if self._embedded and self._server is None:
                await asyncio.to_thread(self._start_server)
            password = self.settings.password
            # Threads verify, probe and resolve; what has to be awaited is awaited in this loop all the same.
            asking = in_loop(password, asyncio.get_running_loop(), self.settings.connect_timeout)
            settings = await asyncio.to_thread(verified, attrs.evolve(self.settings, password=asking))
            self.settings = attrs.evolve(settings, password=password)
            self.pool.configure(settings)
            await self.pool.open()
            if not self.pool.primary.reachable:
                await self.pool.shutdown()
                raise await asyncio.to_thread(explain_no_primary, settings)
            self._from_thread.open()
            self._opened = True
            if self.settings.enable_performance_monitoring:
                self.hooks.add(self.monitor)
                self.monitor.start()
            if self.settings.enable_audit_logging:
                self.audit.start()

    def _start_server(self) -> None:
        from equitie_data.embedded import EmbeddedServer  # noqa: PLC0415 - only where a server is wanted
        from equitie_data.provision import DATABASE, provision  # noqa: PLC0415 - as above

        self._server = EmbeddedServer(self._data_dir)
        self._server.start()
        self.settings = attrs.evolve(self.settings, dsn=provision(self._server))
        self.owner_dsn = self._server.dsn(DATABASE)

    async def close(self, timeout: float = 5.0) -> None:
        """Let calls under way finish, write out what audit and monitor hold, and close every connection.

        A closed database can be opened again.

        Args:
            timeout: Seconds for each of the steps.
        """
        await _to_its_end(self._close(timeout))

    async def _close(self, timeout: float) -> None:
        # Each of the steps is taken, whatever another raises, from the last one named to the first.
        async with self._life, contextlib.AsyncExitStack() as steps:
            if self._server is not None:
                server, self._server, self.owner_dsn = self._server, None, None
                steps.push_async_callback(asyncio.to_thread, server.stop)
            if self._opened:
                self._opened = False
                steps.callback(self._from_thread.close)
                steps.push_async_callback(self.pool.shutdown, timeout)
                steps.callback(self.hooks.remove, self.monitor)
                steps.push_async_callback(in_thread, self._from_thread.threads, self.monitor.close, timeout)
                steps.push_async_callback(self.audit.close, timeout)

    async def __aenter__(self) -> Self:
        try:
            return await self.open()
        except BaseException:
            await self.close()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
