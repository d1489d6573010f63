"""Cleaning up that a cancellation must not cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def uninterrupted(cleaning: Coroutine[Any, Any, None]) -> None:
    """Wait for `cleaning` to its end; a cancellation that comes meanwhile is raised after it."""
    task = asyncio.create_task(cleaning)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
