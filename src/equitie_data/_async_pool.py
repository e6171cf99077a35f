# Written by tools/make_async.py from pool.py: change that one, and run the program.
# fmt: off
# ruff: noqa: ASYNC110, E501, F401, I001, PLR0917, RUF022, RUF100, SLF001
# mypy: disable-error-code="arg-type,assignment,attr-defined,list-item,no-any-return,unused-ignore"
# pyright: reportArgumentType=false, reportUnusedImport=false
"""`execute_read` and `execute_write` over one psycopg `AsyncConnectionPool` per node.

The public calls and the life of the pools; `attempts` carries the calls out.
"""

from __future__ import annotations

import asyncio

from equitie_data._event_loop import BoundedSemaphore, TaskHolder, TidiedFromThread, in_thread, settled

import itertools
import random
import threading
from typing import TYPE_CHECKING, Any, TypeVar, overload

from equitie_data._log import get_logger
from equitie_data._async_attempts import AsyncAttempts
from equitie_data.budget import RetryBudget
from equitie_data._async_call import AsyncCall
from equitie_data.context import Actor, actor_variable
from equitie_data.errors import NoActorError, NotOpenError
from equitie_data.health import HealthWatch
from equitie_data.hooks import Hooks
from equitie_data._async_nodes import AsyncNode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from psycopg import AsyncConnection
    from psycopg.abc import Params, Query
    from psycopg.rows import AsyncRowFactory

    from equitie_data.hooks import Kind
    from equitie_data.routing import Consistency
    from equitie_data.settings import Settings

__all__ = ["AsyncConnectionPools"]

T = TypeVar("T")
R = TypeVar("R")

log = get_logger(__name__)


class AsyncConnectionPools(AsyncAttempts):
    """The pools of a primary and its replicas, and the two calls over them.

    Args:
        settings: How to connect, wait and retry.
        hooks: Who hears of what happens.
    """

    def __init__(self, settings: Settings, hooks: Hooks | None = None) -> None:
        self.settings = settings
        self.hooks = Hooks() if hooks is None else hooks
        self._turns = itertools.count(random.randrange(1 << 16))  # noqa: S311 - spreads load, hides nothing
        self._default_actor = (
            Actor(kind="service", reason="default actor") if settings.default_actor == "service" else None
        )
        self._opened = False
        self._forked = False
        self._make_nodes()

    def _make_nodes(self) -> None:
        settings = self.settings
        self.primary = AsyncNode(settings.dsn, "primary", settings)
        self.replicas = [AsyncNode(replica.dsn, "replica", settings, replica.region) for replica in settings.replicas]
        self._nodes = [self.primary, *self.replicas]
        self._health = HealthWatch(self._nodes, settings, self.hooks, self._promote)
        self._stand_in = BoundedSemaphore(max(settings.max_size // 2, 1))
        self._budget = RetryBudget()
        self._open_lock = threading.Lock()

    # --- life ---------------------------------------------------------------------------------------------

    def configure(self, settings: Settings) -> None:
        """Take other settings, before the pools are opened."""
        self.settings = settings
        self._make_nodes()

    async def open(self) -> None:
        """Start the pools and the health checks; does not wait for connections."""
        for node in self._nodes:
            await node.open()
        self._opened = True
        if self._default_actor is not None:
            log.warning("equitie_data.default_actor", actor="service", row_level_security="bypassed")
        await in_thread(self.executor, self._health.start)

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Stop the health checks and close every connection; those in use close when they come back.

        Args:
            timeout: Seconds to wait for the pools' threads.
        """
        self._opened = self._forked = False
        await in_thread(self.executor, self._health.stop, timeout)
        for node in self._nodes:
            await node.close(timeout)

    def get_stats(self) -> dict[str, Any]:
        """Return each node's counters and gauges, by node name."""
        return {node.name: node.stats() for node in self._nodes}

    # --- the two calls ------------------------------------------------------------------------------------

    @overload
    async def execute_read(
        self,
        operation: Callable[[AsyncConnection[Any]], Awaitable[T]],
        params: None = None,
        *,
        name: str | None = None,
        consistency: Consistency = "session",
        timeout: float | None = None,
        row_factory: AsyncRowFactory[Any] | None = None,
        retry: bool = True,
    ) -> T: ...
    @overload
    async def execute_read(
        self,
        operation: Query,
        params: Params | None = None,
        *,
        name: str | None = None,
        consistency: Consistency = "session",
        timeout: float | None = None,
        row_factory: AsyncRowFactory[R],
        retry: bool = True,
    ) -> list[R]: ...
    @overload
    async def execute_read(
        self,
        operation: Query,
        params: Params | None = None,
        *,
        name: str | None = None,
        consistency: Consistency = "session",
        timeout: float | None = None,
        row_factory: None = None,
        retry: bool = True,
    ) -> list[tuple[Any, ...]]: ...
    async def execute_read(
        self,
        operation: Any,
        params: Params | None = None,
        *,
        name: str | None = None,
        consistency: Consistency = "session",
        timeout: float | None = None,
        row_factory: Any = None,
        retry: bool = True,
    ) -> Any:
        """Read, as whoever is acting; the server refuses writes.

        Args:
            operation: SQL, whose rows are returned, in one round trip; or an async callable taking a psycopg
                `AsyncConnection`, whose result is returned, in one snapshot. A callable may run more than once.
            params: The SQL's parameters.
            name: What to call it in metrics and logs.
            consistency: ``"session"`` sees this context's own writes, ``"eventual"`` takes any healthy replica,
                ``"strong"`` the primary.
            timeout: Seconds for the whole call and for each of its statements; ``math.inf`` for no limit. Left
                out, the settings' ``call_timeout`` and ``statement_timeout`` hold.
            row_factory: Makes the rows of the SQL form; tuples when left out.
            retry: ``False`` for a single attempt.

        Raises:
            NoActorError: Nobody is acting.
            ReadOnlyError: The operation tried to write.
            UnavailableError: No node could serve it in time.
            psycopg.Error: The server refused a statement.
        """
        return await self._run(self._call("read", operation, params, name, consistency, timeout, row_factory, retry))

    @overload
    async def execute_write(
        self,
        operation: Callable[[AsyncConnection[Any]], Awaitable[T]],
        params: None = None,
        *,
        name: str | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        row_factory: AsyncRowFactory[Any] | None = None,
        retry: bool = True,
    ) -> T: ...
    @overload
    async def execute_write(
        self,
        operation: Query,
        params: Params | None = None,
        *,
        name: str | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        row_factory: AsyncRowFactory[R],
        retry: bool = True,
    ) -> list[R]: ...
    @overload
    async def execute_write(
        self,
        operation: Query,
        params: Params | None = None,
        *,
        name: str | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        row_factory: None = None,
        retry: bool = True,
    ) -> Any: ...
    async def execute_write(
        self,
        operation: Any,
        params: Params | None = None,
        *,
        name: str | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        row_factory: Any = None,
        retry: bool = True,
    ) -> Any:
        """Write on the primary, as whoever is acting, in one transaction.

        Args:
            operation: SQL, whose rows (with RETURNING) or row count are returned; or an async callable taking a psycopg
                `AsyncConnection`, whose result is returned. The library commits when it returns and rolls back when it
                raises. A callable may run more than once, so it must have no effect outside the transaction.
            params: The SQL's parameters.
            name: What to call it in metrics and logs.
            idempotency_key: Names this write: a second call with the same key, from any process, at any time until
                the key's retention ends, returns the first one's result without running the operation.
            timeout: As in `execute_read`.
            row_factory: As in `execute_read`.
            retry: As in `execute_read`.

        Raises:
            NoActorError: Nobody is acting.
            SwallowedErrorError: The operation caught a database error and returned; nothing was written.
            OperationEndedTransactionError: The operation ended the transaction itself.
            CommitOutcomeUnknown: The reply to COMMIT was lost.
            UnavailableError: The primary could not be reached in time; nothing was written.
            psycopg.Error: The server refused a statement; nothing was written.
        """
        return await self._run(
            self._call("write", operation, params, name, "strong", timeout, row_factory, retry, idempotency_key)
        )

    def _call(
        self,
        kind: Kind,
        operation: Any,
        params: Params | None,
        name: str | None,
        consistency: Consistency,
        timeout: float | None,
        row_factory: Any,
        retry: bool,
        idempotency_key: str | None = None,
    ) -> AsyncCall:
        actor = actor_variable.get() or self._default_actor
        if actor is None:
            raise NoActorError
        if not self._opened:
            self._open_after_fork()
        return AsyncCall(
            self.settings,
            actor,
            kind,
            operation,
            params,
            name,
            consistency,
            timeout,
            row_factory,
            retry,
            idempotency_key,
        )
