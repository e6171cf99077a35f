"""One call of the asyncio executor: when its cancellation must wait."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import psycopg

from equitie_data.call import Call, call_variable
from equitie_data.retry import Phase

if TYPE_CHECKING:
    from equitie_data._async_wire import AsyncNodeConnection
    from equitie_data.context import WalPosition

__all__ = ["AsyncCall", "call_variable"]

_ANSWER_WITHIN: Final = 10.0  # seconds a cancelled write has left to learn whether it committed


class AsyncCall(Call):
    """What was asked for, and whether somebody has given up waiting for it."""

    alone_on: AsyncNodeConnection[Any] | None = None
    """Where a statement and its commit are under way in one trip."""
    cancelled = False
    cancelling: asyncio.Task[None] | None = None
    seen: WalPosition | None = None

    def must_be_answered(self) -> bool:
        """Whether a COMMIT may have been sent of which nobody knows yet what became."""
        return self.phase is Phase.COMMIT or self.in_doubt

    def cancel(self) -> None:
        """Be done soon: a cancellation is waiting for the answer."""
        self.cancelled = True
        self.deadline = min(self.deadline, time.monotonic() + _ANSWER_WITHIN)
        if self.alone_on is not None:
            # The server may still be at the statement. Either it lets itself be stopped, or it has committed.
            self.cancelling = asyncio.ensure_future(self.alone_on.give_up())

    def quiet(self, seconds: float) -> None:
        """Hear that the server has been silent for so long.

        Raises:
            psycopg.OperationalError: Waiting has become pointless.
        """
        if self.cancelled and time.monotonic() > self.deadline and self.connection is not None:
            self.connection.pgconn.finish()
            raise psycopg.OperationalError("the server did not answer in the time a cancelled call has")
        super().quiet(seconds)

    def note_position(self, position: WalPosition | None) -> None:
        """Have this context's reads see the write, and remember it for the context the call was made in."""
        self.seen = position
        super().note_position(position)
