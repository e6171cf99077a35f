"""Holding a cancellation back, and waiting in turn, without a database."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from equitie_data._event_loop import BoundedSemaphore, Uninterrupted, settled

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


async def ended(task: asyncio.Task[Any]) -> Any:
    await asyncio.wait({task})
    return "cancelled" if task.cancelled() else task.exception() or task.result()


# --- Uninterrupted ------------------------------------------------------------------------------------------------


def test_it_runs_in_the_caller_s_task_and_context() -> None:
    outer: asyncio.Task[Any] | None = None

    async def inner() -> str:
        await asyncio.sleep(0)
        variable.set("set")
        assert asyncio.current_task() is outer
        return "result"

    async def main() -> None:
        nonlocal outer
        outer = asyncio.current_task()
        assert await Uninterrupted(inner()) == "result"
        assert await Uninterrupted(inner(), lambda: False) == "result"
        assert variable.get() == "set"
        with pytest.raises(KeyError):
            await Uninterrupted(fails(KeyError()))

    asyncio.run(main())


async def fails(error: BaseException) -> None:
    await asyncio.sleep(0.001)
    raise error


@pytest.mark.parametrize("cancels", [1, 2, 5])
def test_a_cancellation_waits_for_the_end_and_is_not_lost(cancels: int) -> None:
    steps: list[int] = []

    async def inner() -> str:
        for step in range(5):
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            steps.append(step)
        return "result"

    async def run(**options: Any) -> Any:
        return await Uninterrupted(inner(), **options)

    async def main() -> None:
        held: list[int] = []
        task = asyncio.create_task(run(on_hold=lambda: held.append(1)))
        for _ in range(cancels):
            await asyncio.sleep(0.001)
            task.cancel()
        assert await ended(task) == "cancelled"
        assert steps == [0, 1, 2, 3, 4]
        assert held == [1]

    asyncio.run(main())


def test_it_waits_no_longer_than_it_must() -> None:
    steps: list[str] = []
    held = True

    async def inner() -> None:
        nonlocal held
        await asyncio.sleep(0.01)
        steps.append("held")
        held = False
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            steps.append("told")
            raise

    async def run() -> None:
        await Uninterrupted(inner(), lambda: held)

    async def main() -> None:
        task = asyncio.create_task(run())
        await asyncio.sleep(0)
        task.cancel()
        assert await ended(task) == "cancelled"
        assert steps == ["held", "told"]

    asyncio.run(main())


def test_what_is_not_held_is_cancelled_as_ever() -> None:
    async def child() -> None:
        await asyncio.sleep(3600)

    async def inner() -> str:
        await asyncio.gather(asyncio.sleep(0), children[0])
        return "not reached"

    async def run() -> None:
        await Uninterrupted(inner(), lambda: False)

    async def main() -> None:
        children.append(asyncio.create_task(child()))
        task = asyncio.create_task(run())
        await asyncio.sleep(0.001)
        task.cancel()
        assert await ended(task) == "cancelled"
        assert children[0].cancelled()

    children: list[asyncio.Task[None]] = []
    asyncio.run(main())


def test_a_failure_gives_way_to_the_cancellation_and_stays_its_cause() -> None:
    async def run() -> None:
        with pytest.raises(asyncio.CancelledError) as caught:
            await Uninterrupted(fails(KeyError("mine")))
        assert isinstance(caught.value.__cause__, KeyError)
        raise caught.value

    async def main() -> None:
        task = asyncio.create_task(run())
        await asyncio.sleep(0)
        task.cancel()
        assert await ended(task) == "cancelled"

    asyncio.run(main())


def test_a_loop_that_goes_down_closes_the_coroutine() -> None:
    closed: list[int] = []

    async def inner() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            closed.append(1)

    async def run() -> None:
        await Uninterrupted(inner())

    async def main() -> None:
        running = run()
        running.send(None)  # as far as its first suspension
        running.close()

    asyncio.run(main())
    assert closed == [1]


# --- BoundedSemaphore ---------------------------------------------------------------------------------------------


def test_places_are_given_in_turn_and_never_lost() -> None:
    order: list[int] = []

    async def take(number: int) -> None:
        assert await semaphore.acquire(timeout=10.0)
        order.append(number)

    async def main() -> None:
        assert await semaphore.acquire(timeout=0.0)
        assert await semaphore.acquire(timeout=0.0)
        assert not await semaphore.acquire(timeout=0.001)
        tasks = [asyncio.create_task(take(number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        semaphore.release()
        semaphore.release()
        tasks[2].cancel()  # it was given the place just now
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 3]
        semaphore.release()
        semaphore.release()
        assert await semaphore.acquire(timeout=0.0)
        assert await semaphore.acquire(timeout=0.0)
        assert not await semaphore.acquire(timeout=0.0)

    semaphore = BoundedSemaphore(2)
    asyncio.run(main())


def test_settled() -> None:
    async def value() -> int:
        return 7

    async def main() -> None:
        assert await settled(value()) == 7
        assert await settled(7) == 7

    asyncio.run(main())
