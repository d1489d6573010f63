"""Group commit: many small units of work, each durable before its writer goes on, few flushes to the disk.

A commit waits for the disk (milliseconds); dozens of rollouts that each commit alone would hold up the event
loop and the server's own writes. Units that arrive while a commit is under way share the next one.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from nightschool_server.store.store import Store

Work = Callable[[sqlite3.Connection], None]
"""Writes one unit inside a transaction that is open."""


class Writer:
    """Writes units of work from one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: list[tuple[Work, asyncio.Future[None]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._draining: asyncio.Task[None] | None = None

    async def write(self, work: Work) -> None:
        """Run `work` in a transaction; returns once that is on the disk. Raises what `work` raises."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((work, done))
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        await asyncio.shield(done)

    async def close(self) -> None:
        """Write what is pending and end the thread."""
        if self._draining is not None:
            await self._draining
        self._thread.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._pending:
            batch, self._pending = self._pending, []
            errors = await loop.run_in_executor(self._thread, self._commit, [work for work, _ in batch])
            for (_, done), error in zip(batch, errors, strict=True):
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    def _commit(self, batch: list[Work]) -> list[Exception | None]:
        try:
            with self._store.transaction() as db:
                for work in batch:
                    work(db)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            # One bad unit must not take the others with it.
            return [self._commit([work])[0] for work in batch]
        return [None] * len(batch)
