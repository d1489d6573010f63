"""Many things of a stage at once, ended together: by the last one, the first failure, or a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from nightschool_learner.stages import Cycle

T = TypeVar("T")


async def for_each(cycle: Cycle, units: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Run `work` on every unit, `concurrency` at a time, in order of start.

    The first exception cancels the units in flight and is raised. Raises CycleCancelledError where the
    cycle was cancelled; units in flight are then left unfinished.
    """
    waiting = iter(units)

    async def worker() -> None:
        for unit in waiting:  # one shared iterator: each worker takes the next unit
            cycle.check()
            await work(unit)

    async def watch() -> None:
        await cycle.cancelled.wait()
        cycle.check()

    watcher = asyncio.create_task(watch())
    working = {asyncio.create_task(worker()) for _ in range(concurrency)}
    started = {watcher, *working}
    try:
        while working:
            done, _ = await asyncio.wait({watcher, *working}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            working -= done
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)


async def together(*works: Coroutine[Any, Any, T]) -> list[T]:
    """The results of `works`, in their order. The first failure cancels the others.

    Unlike with `asyncio.gather` none of them runs on behind it: what they hold may go once this has returned or raised.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()  # raises its failure; the others are on their way still
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
