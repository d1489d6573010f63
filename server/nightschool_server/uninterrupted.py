"""Work that a cancellation must not cut short, nor leave behind what it made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is waited for to its end; a cancellation that comes meanwhile is raised after it.

    Also where the work then fails: whoever was cancelled must not take that for a failure to go on from.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # Marks it as seen.
        raise cancelled
    return task.result()


async def obtained(make: Callable[[], T], give_back: Callable[[T], object]) -> T:
    """What `make` gives in a thread, which outlives a cancellation: then it is given back, also in a thread."""
    making = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        await uninterrupted(_given_back(making, give_back))
        raise


async def _given_back(making: asyncio.Future[T], give_back: Callable[[T], object]) -> None:
    await asyncio.wait({making})
    if not making.cancelled() and making.exception() is None:
        await asyncio.to_thread(give_back, making.result())
