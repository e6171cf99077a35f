"""`execute_read` and `execute_write` over one psycopg `ConnectionPool` per node.

A thin executor: which node, whether to retry and what became of a commit are decided in `routing`, `retry` and
`commit`. The first attempt is made bare; tenacity comes in only after it failed, because entering it costs as
much as a fast query.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, overload

import psycopg
import structlog
import tenacity
from psycopg.pq import TransactionStatus

from equitie_data.call import Call, WriteTransaction, check_transaction_open
from equitie_data.context import Actor, actor_variable, transaction_variable
from equitie_data.errors import ConfigurationError, NoActorError, NotOpenError
from equitie_data.health import HealthWatch
from equitie_data.hooks import Hooks
from equitie_data.nodes import Node
from equitie_data.prologue import prologue_for
from equitie_data.retry import Phase
from equitie_data.routing import read_order

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection
    from psycopg.abc import Params, Query
    from psycopg.rows import RowFactory

    from equitie_data.hooks import Kind
    from equitie_data.routing import Consistency
    from equitie_data.settings import Settings
    from equitie_data.wire import NodeConnection

__all__ = ["ConnectionPools"]

T = TypeVar("T")
R = TypeVar("R")

log = structlog.get_logger(__name__)

_of_the_parent: list[object] = []
_wrote: ContextVar[bool] = ContextVar("equitie_data.wrote", default=False)


class ConnectionPools:
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
        self._health = HealthWatch((self.primary, *self.replicas), settings.health_check_interval, self.hooks)
        self._open_lock = threading.Lock()

    # --- life ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the pools and the health checks; does not wait for connections."""
        for node in (self.primary, *self.replicas):
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
        for node in (self.primary, *self.replicas):
            node.close(timeout)

    def after_fork(self) -> None:
        """Make new pools in a forked child, opened by its first call.

        The parent's are kept out of reach of the garbage collector: closing them here would end its sessions.
        """
        _of_the_parent.append((self.primary, self.replicas))
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
        return {node.name: node.stats() for node in (self.primary, *self.replicas)}

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
            idempotency_key: Not available in this release, and refused.
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
        if idempotency_key is not None:
            raise ConfigurationError("idempotency_key is not available in this release: leave it out.")
        result = self._run(self._call("write", operation, params, name, "strong", timeout, row_factory, retry))
        _wrote.set(True)
        return result

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
    ) -> Call:
        actor = actor_variable.get() or self._default_actor
        if actor is None:
            raise NoActorError
        return Call(self.settings, actor, kind, operation, params, name, consistency, timeout, row_factory, retry)

    # --- attempts -------------------------------------------------------------------------------------------------

    def _run(self, call: Call) -> Any:
        if not self._opened:
            self._open_after_fork()
        try:
            try:
                result = self._attempt(call)
            except psycopg.Error as failure:
                result = self._recover(call, failure)
        except BaseException as error:
            if self.hooks:
                call.end(self.hooks, error)
            raise
        if self.hooks:
            call.end(self.hooks, None)
        return result

    def _attempt(self, call: Call) -> Any:
        call.phase, call.connection = Phase.CHECKOUT, None
        call.node = node = self._route(call)
        before = time.monotonic()
        connection: NodeConnection[Any] | None = None
        try:
            connection = node.checkout(min(self.settings.checkout_timeout, max(call.deadline - before, 0.001)))
            call.connection, call.phase = connection, Phase.STATEMENT
            if self.hooks:
                connection.observer = call.start(self.hooks, node, time.monotonic() - before)
            if call.decision is not None and call.decision.unprepared:
                connection.prepare_threshold = None
            connection.pending = prologue_for(call.actor, call.kind, call.statement_timeout)
            if callable(call.operation):
                return self._run_operation(call, connection)
            return self._run_statement(call, connection)
        except psycopg.Error as error:
            call.judge(error)
            if call.ejects is not None:
                self._health.eject(node, call.ejects)
            if connection is not None and call.decision is not None and call.decision.discard:
                connection.close()
            raise
        finally:
            if connection is not None:
                self._roll_back(connection)
                node.checkin(connection)

    def _run_statement(self, call: Call, connection: NodeConnection[Any]) -> Any:
        cursor = connection.cursor(row_factory=call.row_factory) if call.row_factory else connection.cursor()
        prologue, connection.pending = connection.pending, None
        if call.kind == "write":
            call.phase = Phase.COMMIT  # the commit is part of the statement's own trip
        with connection.lock:
            connection.wait(cursor.execute_alone_gen(prologue, call.operation, call.params))
        if cursor.description is not None:
            return cursor.fetchall()
        return [] if call.kind == "read" else cursor.rowcount

    def _run_operation(self, call: Call, connection: NodeConnection[Any]) -> Any:
        transaction = WriteTransaction(connection)
        token = transaction_variable.set(transaction) if call.kind == "write" else None
        connection.in_operation = True
        try:
            result = call.operation(connection)
            check_transaction_open(connection)
            for action in transaction.actions:
                action(connection)
                check_transaction_open(connection)
        finally:
            connection.in_operation = False
            if token is not None:
                transaction_variable.reset(token)
        if connection.pending is None:
            call.phase = Phase.COMMIT
            with connection.lock:
                connection.wait(connection.command_gen(b"COMMIT"))
        return result

    def _roll_back(self, connection: NodeConnection[Any]) -> None:
        """Roll back what is still open, so that the connection can go back."""
        if connection.pgconn.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            try:
                with connection.lock:
                    connection.wait(connection.command_gen(b"ROLLBACK"))
            except psycopg.Error:
                connection.close()

    def _recover(self, call: Call, first: psycopg.Error) -> Any:
        """Go on after a first failure, or raise what it means."""
        pending = [first]

        def attempt() -> Any:
            if pending:
                raise pending.pop()
            call.attempt += 1
            return self._attempt(call)

        def announce(state: tenacity.RetryCallState) -> None:
            if self.hooks:
                error = None if state.outcome is None else state.outcome.exception()
                call.again(self.hooks, error, float(state.upcoming_sleep))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(call.may_go_on),
            stop=lambda state: call.exhausted(state.attempt_number),
            wait=lambda state: call.pause(state.attempt_number),
            before_sleep=announce,
            reraise=True,
        )
        try:
            return retrying(attempt) if call.may_go_on(first) else attempt()
        except psycopg.Error as error:
            translated = call.translated(error)
            if translated is error:
                raise
            raise translated from error

    def _route(self, call: Call) -> Node:
        if call.kind == "write" or call.use_primary or not self.replicas:
            return self.primary
        order = read_order(
            call.consistency,
            [node.health for node in self.replicas],
            turn=next(self._turns),
            wrote=_wrote.get(),
            max_lag=self.settings.max_replica_lag,
        )
        return self.replicas[order[0]] if order else self.primary
