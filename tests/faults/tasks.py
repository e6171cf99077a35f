"""The same load on the asyncio side: every session's calls are tasks of one event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from tests.faults.ledger import CHANGE_BALANCE, COUNT_UP, RECORD

from equitie_data.aio import AsyncDatabase

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from psycopg import AsyncConnection
    from tests.faults.ledger import Transfer
    from typing_extensions import Self

    from equitie_data import Settings


class InTasks:
    """An `AsyncDatabase` in an event loop of its own, with the two calls as `Load` makes them.

    Args:
        settings: How to connect.
        listener: Hears of its events.
    """

    def __init__(self, settings: Settings, listener: Any) -> None:
        self._database = AsyncDatabase(settings, hooks=[listener])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="event loop", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._database.open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run(self._database.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def execute_read(self, sql: str, params: Any, **options: Any) -> Any:
        return self._run(self._database.execute_read(sql, params, **options))

    def execute_write(self, operation: Any, params: Any = None, **options: Any) -> Any:
        if callable(operation):
            operation = _awaited(operation)
        return self._run(self._database.execute_write(operation, params, **options))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        # The task gets a copy of the calling thread's context, and with it the actor.
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _awaited(operation: Any) -> Callable[[AsyncConnection[Any]], Coroutine[Any, Any, int]]:
    transfer: Transfer = operation.__self__

    async def awaited(connection: AsyncConnection[Any]) -> int:
        row = await (await connection.execute(COUNT_UP, [transfer.session_id])).fetchone()
        await connection.execute(CHANGE_BALANCE, [-transfer.amount, transfer.source])
        await connection.execute(CHANGE_BALANCE, [transfer.amount, transfer.target])
        await connection.execute(
            RECORD, [transfer.transfer_id, transfer.source, transfer.target, transfer.amount, transfer.session_id]
        )
        assert row is not None
        return int(row[0])

    return awaited
