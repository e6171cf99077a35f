"""The asyncio classes of `wire`: its generators, awaited."""

from __future__ import annotations

import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from psycopg import AsyncConnection, AsyncCursor, AsyncServerCursor, Error
from psycopg.rows import Row as RowType

from equitie_data._event_loop import settled
from equitie_data.exchange import watched
from equitie_data.transaction import WriteTransaction
from equitie_data.wire import NodeConnection, PrologueCarrier, PrologueRider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from psycopg import AsyncCopy, AsyncPipeline, AsyncTransaction, Connection
    from psycopg.abc import PQGen

__all__ = ["AsyncNodeConnection", "AsyncNodeCursor", "blocking_view"]


_GIVE_UP_WITHIN = 5.0  # seconds


class AsyncNodeCursor(PrologueRider, AsyncCursor[RowType]):
    """A cursor that takes its connection's pending prologue along, and reports what it ran."""

    async def executemany(self, *args: Any, **kwargs: Any) -> None:
        """Run a statement for every set of parameters; reported as one."""
        await self._conn.flush_prologue()  # it opens a pipeline of its own
        with self.observed():
            await super().executemany(*args, **kwargs)

    @asynccontextmanager
    async def copy(self, *args: Any, **kwargs: Any) -> AsyncIterator[AsyncCopy]:
        """Run COPY; its duration counts to the end of the block."""
        with self.observed():
            async with super().copy(*args, **kwargs) as copy:
                yield copy

    async def stream(self, *args: Any, **kwargs: Any) -> AsyncIterator[RowType]:
        """Run a query row by row; its duration counts to the last row taken."""
        taken = 0
        with self.observed(lambda: taken):
            async for row in super().stream(*args, **kwargs):
                taken += 1
                yield row


class AsyncNodeServerCursor(PrologueRider, AsyncServerCursor[RowType]):
    """A server-side cursor that reports its declaration."""

    def _declare_gen(self, *args: Any, **kwargs: Any) -> PQGen[None]:
        with self.observed():
            yield from super()._declare_gen(*args, **kwargs)


class AsyncNodeConnection(PrologueCarrier, AsyncConnection[RowType]):
    """A connection of a node's pool."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_notice_handler(self.note_notice)
        self.cursor_factory = AsyncNodeCursor
        self.server_cursor_factory = AsyncNodeServerCursor
        self.savepoints: list[WriteTransaction] = []
        """The `transaction` blocks it is in, and what each will do before it ends well."""

    async def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """Drive a generator, under the eye of `watch`."""
        return await super().wait(gen if self.watch is None else watched(gen, self.watch), *args, **kwargs)

    def _start_query(self) -> PQGen[None]:
        yield from self.send_prologue_gen()
        yield from super()._start_query()

    async def flush_prologue(self) -> None:
        """Open the transaction now, for what cannot take the prologue along."""
        if self.pending is not None:
            async with self.lock:
                await self.wait(self.send_prologue_gen())

    @asynccontextmanager
    async def transaction(self, *args: Any, **kwargs: Any) -> AsyncIterator[AsyncTransaction]:
        """Open a savepoint: the transaction itself is the library's."""
        await self.flush_prologue()
        savepoint = WriteTransaction(cast("Connection[Any]", self))
        async with super().transaction(*args, **kwargs) as transaction:
            self.savepoints.append(savepoint)
            try:
                yield transaction
                for action in savepoint.actions:
                    await settled(action(savepoint.connection))
            finally:
                self.savepoints.remove(savepoint)

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[AsyncPipeline]:
        """Enter pipeline mode, the prologue first."""
        await self.flush_prologue()
        async with super().pipeline() as pipeline:
            yield pipeline

    async def give_up(self) -> None:
        """Ask the server to stop what it is at, if it can be reached."""
        with contextlib.suppress(Error):
            await self.cancel_safe(timeout=_GIVE_UP_WITHIN)

    async def commit(self) -> None:
        """Refused during an operation."""
        self.refuse_to_end()
        await super().commit()

    async def rollback(self) -> None:
        """Refused during an operation."""
        self.refuse_to_end()
        await super().rollback()


_CARRIED = ("_adapters", "_autocommit", "_prepared", "in_operation", "observer", "watch")


def blocking_view(connection: AsyncNodeConnection[Any]) -> NodeConnection[Any]:
    """Return the same connection to the server as a blocking one, for code that blocks, in a thread of its own.

    Nothing else may use the connection until that code is done. It must have flushed its prologue.
    """
    told = connection.pgconn.notice_handler, connection.pgconn.notify_handler
    view: NodeConnection[Any] = NodeConnection(connection.pgconn)
    connection.pgconn.notice_handler, connection.pgconn.notify_handler = told
    for name in _CARRIED:
        setattr(view, name, getattr(connection, name))
    view._pool = None  # noqa: SLF001 - so that psycopg does not take it for one that was forgotten
    return view
