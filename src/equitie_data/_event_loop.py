"""What the blocking executor has from threads, and the asyncio one from its event loop.

Cancellation is the one thing without a counterpart: it can arrive at every ``await``, also between a COMMIT and its
reply. `Uninterrupted` holds it back for as long as an answer is still needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections import deque
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from equitie_data.context import position_variable, remember_position
from equitie_data.nodes import Holder

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator
    from concurrent.futures import Executor
    from types import FrameType

__all__ = ["BoundedSemaphore", "TaskHolder", "TidiedFromThread", "Uninterrupted", "in_thread", "settled"]

P = ParamSpec("P")
T = TypeVar("T")


async def settled(value: Any) -> Any:
    """Return what may have to be awaited first."""
    return await value if inspect.isawaitable(value) else value


async def in_thread(executor: Executor | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what blocks in a thread, in a copy of this context; what it wrote there, this context's reads see.

    Args:
        executor: Whose thread; the event loop's own when None.
        function: What blocks.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    context = copy_context()
    call = partial(context.run, partial(function, *args, **kwargs))
    result = await asyncio.get_running_loop().run_in_executor(executor, call)
    position = context.get(position_variable)
    if position is not None:
        remember_position(position)
    return result


class Uninterrupted(Generic[T]):
    """Awaits a coroutine, and delivers a cancellation only when it may be.

    Unlike under `asyncio.shield` the coroutine stays in its caller's task and context, and next to nothing is paid for
    it until somebody cancels.

    Args:
        coroutine: What to await.
        holds: Asked at every suspension whether a cancellation must wait; it always must, if left out.
        on_hold: Called when the first one does.
    """

    __slots__ = ("coroutine", "holds", "on_hold")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, T],
        holds: Callable[[], bool] | None = None,
        on_hold: Callable[[], None] | None = None,
    ) -> None:
        self.coroutine = coroutine
        self.holds = holds
        self.on_hold = on_hold

    def __await__(self) -> Generator[Any, Any, T]:
        coroutine, holds = self.coroutine, self.holds
        held: asyncio.CancelledError | None = None
        thrown: BaseException | None = None
        while True:
            try:
                future = coroutine.send(None) if thrown is None else coroutine.throw(thrown)
            except StopIteration as stop:
                if held is not None:
                    raise held from None
                return stop.value  # type: ignore[no-any-return]
            except Exception as error:
                if held is not None:
                    raise held from error
                raise
            thrown = None
            while True:
                holding = holds is None or holds()
                try:
                    if holding:
                        yield from _until_done(future)
                    elif held is None:
                        yield future
                    else:
                        thrown, held = held, None
                        _abandon(future)
                except asyncio.CancelledError as cancellation:
                    if not holding:
                        thrown = cancellation
                        break
                    if held is None:
                        held = cancellation
                        if self.on_hold is not None:
                            self.on_hold()
                    if future is not None and not future.done():
                        continue
                except BaseException as error:  # noqa: BLE001 - GeneratorExit, for the coroutine to end as well
                    thrown = error
                break


def _until_done(future: asyncio.Future[Any] | None) -> Generator[Any, Any, None]:
    """Wait for a future behind another one, which a cancellation of the task cancels in its stead."""
    if future is None:  # asyncio.sleep(0)
        yield
        return
    future._asyncio_future_blocking = False  # noqa: SLF001 - the protocol of tasks and futures
    if not future.done():
        stand_in = future.get_loop().create_future()
        future.add_done_callback(lambda _: _settle(stand_in, True))
        yield from stand_in


def _abandon(future: asyncio.Future[Any] | None) -> None:
    """Do to what a task waits for what the task's own `cancel` would have done."""
    if future is not None:
        future._asyncio_future_blocking = False  # noqa: SLF001 - as above
        future.cancel()


class BoundedSemaphore:
    """As in `threading`, with a timeout, and served in turn.

    Args:
        value: How many may hold it at once.
    """

    def __init__(self, value: int) -> None:
        self._free = value
        self._waiters: deque[asyncio.Future[bool]] = deque()

    async def acquire(self, *, timeout: float) -> bool:
        """Take a place.

        Args:
            timeout: Seconds to wait for one.

        Returns:
            Whether there was one.
        """
        if self._free > 0:
            self._free -= 1
            return True
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiters.append(waiter)
        timer = loop.call_later(timeout, _settle, waiter, False)
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.result():
                self.release()  # it was given just before
            raise
        finally:
            timer.cancel()
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)

    def release(self) -> None:
        """Give the place to whoever has waited longest."""
        while self._waiters:
            if _settle(self._waiters.popleft(), True):
                return
        self._free += 1


def _settle(waiter: asyncio.Future[bool], result: bool) -> bool:
    if waiter.done():
        return False
    waiter.set_result(result)
    return True


class TaskHolder(Holder):
    """A task that has a connection."""

    __slots__ = ("_task",)

    def __init__(self, since: float, name: str | None) -> None:
        super().__init__(since, name)
        self._task = asyncio.current_task()

    @property
    def who(self) -> str:
        """The task's name."""
        return "a task" if self._task is None else self._task.get_name()

    def frames(self) -> Iterator[FrameType]:
        """Yield what the task is in the middle of, from the inside."""
        found: list[FrameType] = []
        suspended: Any = None if self._task is None else self._task.get_coro()
        while suspended is not None:
            frame = getattr(suspended, "cr_frame", None) or getattr(suspended, "gi_frame", None)
            following = getattr(suspended, "cr_await", None) or getattr(suspended, "gi_yieldfrom", None)
            if frame is not None:
                found.append(frame)
                if frame.f_code is Uninterrupted.__await__.__code__:
                    following = frame.f_locals["coroutine"]  # awaited by hand, which Python does not see
            suspended = following
        yield from reversed(found)


class TidiedFromThread:
    """What the health watch's thread asks of a node, done in the event loop that the node's connections belong to."""

    loop: asyncio.AbstractEventLoop
    executor: Executor | None = None
    _tidying: asyncio.Task[None] | None = None

    def sweep(self, idle: float) -> None:
        """Have the loop do what `Node.sweep` and `Node.settle` do."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the connections with it
            self.loop.call_soon_threadsafe(self._tidy, idle)

    def settle(self) -> None:
        """Nothing: `sweep` does it."""

    def _tidy(self, idle: float) -> None:
        if self._tidying is None or self._tidying.done():
            self._tidying = self.loop.create_task(self._sweep_and_settle(idle))

    async def _sweep_and_settle(self, idle: float) -> None:
        await self._sweep(idle)  # type: ignore[attr-defined]
        await self._settle()  # type: ignore[attr-defined]
