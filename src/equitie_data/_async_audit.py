"""The audit log of an `AsyncDatabase`, and how code that blocks reaches the event loop from its threads.

The audit queue and the monitor write in threads of their own, with code that blocks. They need no second pool: the
event loop checks a connection out for them, and lends it to a thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import time
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from equitie_data._async_wire import AsyncNodeConnection, blocking_view
from equitie_data._event_loop import Uninterrupted, in_thread
from equitie_data.audit import AuditLogger
from equitie_data.audit_queue import AuditQueue, record
from equitie_data.context import current_transaction, position_variable, remember_position
from equitie_data.errors import CommitOutcomeUnknown, NotOpenError, UnavailableError
from equitie_data.redaction import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from psycopg import Connection

    from equitie_data.aio import Pools
    from equitie_data.audit_events import AuditEvent
    from equitie_data.context import Transaction
    from equitie_data.redaction import Redaction

__all__ = ["AsyncAuditLogger", "FromThread"]

P = ParamSpec("P")
R = TypeVar("R")

_POLL = 1.0  # seconds after which a thread looks whether the event loop still runs


class FromThread:
    """`execute_read` and `execute_write` of pools in an event loop, for threads.

    Args:
        pools: The pools.
    """

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._loop: asyncio.AbstractEventLoop | None = None
        self.threads: concurrent.futures.ThreadPoolExecutor | None = None
        """Threads that may wait for the event loop: apart from those that it may have to wait for in turn."""

    def open(self) -> None:
        """Take the running event loop for the one that the pools are open in."""
        self._loop = asyncio.get_running_loop()
        self.threads = concurrent.futures.ThreadPoolExecutor(2, "equitie-aio-audit")

    def close(self) -> None:
        """End the threads."""
        if self.threads is not None:
            self.threads.shutdown(wait=False)
            self.threads = None

    @property
    def in_loop(self) -> bool:
        """Whether this is the event loop's own thread, in which waiting for the loop would be for ever."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def execute_read(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        """Read as `Database.execute_read` does."""
        return self._wait_for(self._pools.execute_read, operation, args, kwargs)

    def execute_write(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        """Write as `Database.execute_write` does."""
        return self._wait_for(self._pools.execute_write, operation, args, kwargs)

    def _wait_for(self, execute: Any, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loop = self._loop
        if loop is None or not loop.is_running():
            raise self._ended()
        if self.in_loop:
            raise UnavailableError("This would block the event loop: run it in a thread, by asyncio.to_thread.")

        async def run() -> Any:
            result = await execute(self._lent(operation) if callable(operation) else operation, *args, **kwargs)
            return result, position_variable.get()

        answer = asyncio.run_coroutine_threadsafe(run(), loop)
        while not concurrent.futures.wait([answer], timeout=_POLL).done:
            if not loop.is_running():
                raise self._ended()
        try:
            result, position = answer.result()
        except concurrent.futures.CancelledError:
            raise CommitOutcomeUnknown(
                "The event loop ended during a write, and nobody knows what became of it."
            ) from None
        if position:
            remember_position(position)
        return result

    @staticmethod
    def _ended() -> NotOpenError:
        return NotOpenError("The event loop that the database was opened in has ended: close the database in it.")

    def _lent(self, operation: Callable[[Any], R]) -> Callable[[AsyncNodeConnection[Any]], Awaitable[R]]:
        async def lend(connection: AsyncNodeConnection[Any]) -> R:
            await connection.flush_prologue()
            # To its end: nothing may happen to a connection while a thread has it.
            return await Uninterrupted(in_thread(self._pools.executor, operation, blocking_view(connection)))

        return lend


def _awaited(
    method: Callable[Concatenate[AuditLogger, P], R],
) -> Callable[[Callable[..., Any]], Callable[Concatenate[AsyncAuditLogger, P], Coroutine[Any, Any, R]]]:
    """Give a coroutine function the arguments, the result and the documentation of the method it awaits."""
    return functools.wraps(method)


class AsyncAuditLogger(AuditLogger):
    """`AuditLogger` in an event loop: what reads or writes is awaited, `log` and its like stay plain calls.

    Args:
        from_thread: The database, for threads.
        enabled: Whether events are recorded at all.
        redaction: What must not be written down.
        capacity: Events that may wait outside transactions; beyond it `log` raises `UnavailableError`.
    """

    def __init__(
        self,
        from_thread: FromThread,
        *,
        enabled: bool = True,
        redaction: Redaction = DEFAULT,
        capacity: int = 10_000,
    ) -> None:
        super().__init__(
            execute_write=from_thread.execute_write,
            execute_read=from_thread.execute_read,
            enabled=enabled,
            redaction=redaction,
        )
        self._from_thread = from_thread
        self._queue = _Queue(from_thread, batch_size=self._batch_size, capacity=capacity)

    @_awaited(AuditLogger.close)
    async def close(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        return await in_thread(self._from_thread.threads, super().close, *args, **kwargs)

    @_awaited(AuditLogger.query)
    async def query(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return await in_thread(self._from_thread.threads, super().query, *args, **kwargs)

    async def flush(self, timeout: float | None = None) -> None:  # type: ignore[override]
        """Write everything recorded so far: what belongs to the running transaction on its connection, the rest now.

        Args:
            timeout: Seconds; None for the database's own limits.

        Raises:
            UnavailableError: The time was up first.
            Exception: What writing raised; the events stay queued.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        transaction = current_transaction()
        if transaction is not None:
            connection = cast("AsyncNodeConnection[Any]", transaction.connection)
            for part in (transaction, *connection.savepoints):
                if self in part.local:
                    await self._send_all(part.local[self], connection)
        await in_thread(self._from_thread.threads, self._queue.flush, deadline)

    def _add_to(self, transaction: Transaction, event: AuditEvent) -> None:
        # Nothing can be sent here, where nothing is awaited: a savepoint's events are sent before it is released.
        savepoints = cast("AsyncNodeConnection[Any]", transaction.connection).savepoints
        part: Any = savepoints[-1] if savepoints else transaction
        waiting: list[AuditEvent] | None = part.local.get(self)
        if waiting is None:
            waiting = part.local[self] = []
            part.before_commit(functools.partial(self._send_all, waiting))
        waiting.append(event)

    async def _send_all(self, waiting: list[AuditEvent], connection: AsyncNodeConnection[Any]) -> None:
        while waiting:
            events: Sequence[AuditEvent] = waiting[: self._batch_size]
            await cast("Any", record(cast("Connection[Any]", connection), events))
            del waiting[: len(events)]
            self._sent_in_transactions += len(events)


class _Queue(AuditQueue):
    """A queue whose events may come from the event loop itself, which must not wait for room."""

    def __init__(self, from_thread: FromThread, *, batch_size: int, capacity: int) -> None:
        super().__init__(
            execute_write=from_thread.execute_write, batch_size=batch_size, flush_interval=5.0, capacity=capacity
        )
        self._from_thread = from_thread

    def _make_room(self) -> None:
        if self._from_thread.in_loop:
            raise UnavailableError(
                f"The audit queue is full, {self._capacity} events wait for the database: await audit.flush() first."
            )
        super()._make_room()
