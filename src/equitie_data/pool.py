"""`execute_read` and `execute_write` over one psycopg `ConnectionPool` per node.

The public calls and the life of the pools; `attempts` carries the calls out.
"""

from __future__ import annotations

import itertools
import random
import threading
from typing import TYPE_CHECKING, Any, TypeVar, overload

from equitie_data._log import get_logger
from equitie_data.attempts import Attempts
from equitie_data.budget import RetryBudget
from equitie_data.call import Call
from equitie_data.context import Actor, actor_variable
from equitie_data.errors import NoActorError, NotOpenError
from equitie_data.health import HealthWatch
from equitie_data.hooks import Hooks
from equitie_data.nodes import Node

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection
    from psycopg.abc import Params, Query
    from psycopg.rows import RowFactory

    from equitie_data.hooks import Kind
    from equitie_data.routing import Consistency
    from equitie_data.settings import Settings

__all__ = ["ConnectionPools"]

T = TypeVar("T")
R = TypeVar("R")

log = get_logger(__name__)

_of_the_parent: list[object] = []


class ConnectionPools(Attempts):
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
        self.primary = Node(settings.dsn, "primary", settings)
        self.replicas = [Node(replica.dsn, "replica", settings, replica.region) for replica in settings.replicas]
        self._nodes = [self.primary, *self.replicas]
        self._health = HealthWatch(self._nodes, settings, self.hooks, self._promote)
        self._stand_in = threading.BoundedSemaphore(max(settings.max_size // 2, 1))
        self._budget = RetryBudget()
        self._open_lock = threading.Lock()

    # --- life ---------------------------------------------------------------------------------------------

    def configure(self, settings: Settings) -> None:
        """Take other settings, before the pools are opened."""
        self.settings = settings
        self._make_nodes()

    def open(self) -> None:
        """Start the pools and the health checks; does not wait for connections."""
        for node in self._nodes:
            node.open()
        self._opened = True
        if self._default_actor is not None:
            log.warning("equitie_data.default_actor", actor="service", row_level_security="bypassed")
        self._health.start()

    def shutdown(self, timeout: float = 5.0) -> None:
        """Stop the health checks and close every connection; those in use close when they come back.

        Args:
            timeout: Seconds to wait for the pools' threads.
        """
        self._opened = self._forked = False
        self._health.stop(timeout)
        for node in self._nodes:
            node.close(timeout)

    def after_fork(self) -> None:
        """Make new pools in a forked child, opened by its first call.

        The parent's are kept out of reach of the garbage collector: closing them here would end its sessions.
        """
        _of_the_parent.append(self._nodes)
        self._make_nodes()
        self._opened, self._forked = False, self._opened or self._forked

    def _open_after_fork(self) -> None:
        with self._open_lock:
            if not self._opened:
                if not self._forked:
                    raise NotOpenError("The database is not open: use it in a `with` block, or call open() first.")
                self.open()

    def get_stats(self) -> dict[str, Any]:
        """Return each node's counters and gauges, by node name."""
        return {node.name: node.stats() for node in self._nodes}

    # --- the two calls ------------------------------------------------------------------------------------

    @overload
    def execute_read(
        self,
        operation: Callable[[Connection[Any]], T],
        params: None = None,
        *,
        name: str | None = None,
        consistency: Consistency = "session",
        timeout: float | None = None,
        row_factory: RowFactory[Any] | None = None,
        retry: bool = True,
    ) -> T: ...
    @overload
    def execute_read(
        self,
        operation: Query,
        params: Params | None = None,
        *,
        name: str | None = None,
        consistency: Consistency = "session",
        timeout: float | None = None,
        row_factory: RowFactory[R],
        retry: bool = True,
    ) -> list[R]: ...
    @overload
    def execute_read(
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
    def execute_read(
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
            operation: SQL, whose rows are returned, in one round trip; or a callable taking a psycopg
                `Connection`, whose result is returned, in one snapshot. A callable may run more than once.
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
        return self._run(self._call("read", operation, params, name, consistency, timeout, row_factory, retry))

    @overload
    def execute_write(
        self,
        operation: Callable[[Connection[Any]], T],
        params: None = None,
        *,
        name: str | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        row_factory: RowFactory[Any] | None = None,
        retry: bool = True,
    ) -> T: ...
    @overload
    def execute_write(
        self,
        operation: Query,
        params: Params | None = None,
        *,
        name: str | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        row_factory: RowFactory[R],
        retry: bool = True,
    ) -> list[R]: ...
    @overload
    def execute_write(
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
    def execute_write(
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
            operation: SQL, whose rows (with RETURNING) or row count are returned; or a callable taking a psycopg
                `Connection`, whose result is returned. The library commits when it returns and rolls back when it
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
        return self._run(
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
    ) -> Call:
        actor = actor_variable.get() or self._default_actor
        if actor is None:
            raise NoActorError
        if not self._opened:
            self._open_after_fork()
        return Call(
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
