"""What a test may not leave behind: processes, file descriptors, files in a folder."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

MAX_ROUNDS = 1000
"""Of the event loop, in which it must have given everything back."""


@asynccontextmanager
async def no_leaks(folder: Path) -> AsyncIterator[None]:
    """Compare before and after: child processes, open descriptors, what lies in `folder`."""
    # The event loop opens what it needs for subprocesses with the first one.
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    # What earlier tests have dropped must not be given back in between.
    gc.collect()
    before = _count(folder)
    yield
    # A closed transport gives its descriptor back in one of the loop's next rounds.
    for _ in range(MAX_ROUNDS):
        if _count(folder) == before:
            break
        await asyncio.sleep(0)
    assert _count(folder) == before


async def read_pids(fifo: Path) -> list[int]:
    """Wait until a tool has written process ids into `fifo`."""
    return [int(pid) for pid in (await asyncio.to_thread(fifo.read_text)).split()]


def make_fifo(folder: Path) -> Path:
    """A FIFO outside every workspace."""
    path = folder / "pids"
    os.mkfifo(path)
    return path


def _count(folder: Path) -> tuple[set[int], int, list[Path]]:
    me = psutil.Process()
    return {child.pid for child in me.children(recursive=True)}, me.num_fds(), sorted(folder.rglob("*"))
