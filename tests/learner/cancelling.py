"""A write that is cancelled while it waits for the database."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from nightschool_server.store.store import Store


async def cancelled_while_locked(store: Store, write: Coroutine[Any, Any, None]) -> None:
    """Start the write, cancel it while the database is locked, and wait until it has heard of that."""
    with store.transaction():  # until it ends nothing else is written
        writing = asyncio.create_task(write)
        for number in range(9):
            if number == 5:
                writing.cancel()
            await asyncio.sleep(0)
        assert not writing.done()
    await asyncio.wait({writing})
    assert writing.cancelled()
