"""What a test may not leave behind: processes, file descriptors, files in a folder."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

WAIT_S = 60.0
"""Within which everything must have been given back."""


@dataclass(frozen=True)
class Held:
    """What this process has, and what lies in a folder."""

    children: frozenset[int]
    descriptors: frozenset[tuple[int, int, int]]
    """Number, device and inode."""
    files: frozenset[str]

    def beyond(self, before: Held) -> list[object]:
        """What there was not before, and files that are gone.

        A descriptor or a process less is no leak: what earlier tests held may go at any time, in threads of gRPC's own.
        """
        return [
            *(self.children - before.children),
            *(self.descriptors - before.descriptors),
            *(self.files ^ before.files),
        ]


@asynccontextmanager
async def no_leaks(folder: Path) -> AsyncIterator[None]:
    """Compare before and after: child processes, open descriptors, what lies in `folder`."""
    # The event loop opens what it needs for subprocesses with the first one.
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    # Nor is what earlier tests have dropped this one's.
    gc.collect()
    before = _held(folder)
    yield
    # A closed transport gives its descriptor back in one of the loop's next rounds.
    loop = asyncio.get_running_loop()
    until = loop.time() + WAIT_S
    while _held(folder).beyond(before) and loop.time() < until:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert _held(folder).beyond(before) == []


async def read_pids(fifo: Path) -> list[int]:
    """Wait until a tool has written process ids into `fifo`.

    Not in a thread, which would wait for ever where the tool ends before it writes.
    """
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    loop.add_reader(descriptor, told.set)
    try:
        await told.wait()
        return [int(pid) for pid in os.read(descriptor, 4096).split()]
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def make_fifo(folder: Path) -> Path:
    """A FIFO outside every workspace."""
    path = folder / "pids"
    os.mkfifo(path)
    return path


def _held(folder: Path) -> Held:
    return Held(
        frozenset(child.pid for child in psutil.Process().children(recursive=True)),
        frozenset(_descriptors()),
        frozenset(os.path.join(place, name) for place, *found in os.walk(folder) for names in found for name in names),
    )


def _descriptors() -> list[tuple[int, int, int]]:
    found = []
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # That of the listing itself has gone.
            status = os.fstat(int(name))
            if not _is_of_a_database(name):
                found.append((int(name), status.st_dev, status.st_ino))
    return found


def _is_of_a_database(descriptor: str) -> bool:
    """A server that many tests share writes now and then, in a thread that opens its database for itself."""
    with suppress(OSError):
        return Path(os.readlink(f"/dev/fd/{descriptor}")).name.startswith("nightschool.db")
    return False
