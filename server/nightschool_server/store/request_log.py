"""The request log: one writer thread behind a bounded queue.

Two promises. `offer` never holds up a request: it queues a line, or drops and counts it when the queue is full; a line
that was queued survives kill -9 once it is written, a power loss once anything durable is written after it
(`synchronous=NORMAL`). `write`, `feedback` and `forget` return when their rows are on the disk (`synchronous=FULL`).
All of them commit in groups: one transaction for what is waiting, so that a flush is shared.

Owns the tables `requests`, `messages`, `request_blobs` and `feedback`; the SQL is in `request_rows.py`, what is taken
out of text in `redact.py`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from nightschool_server.errors import AlreadyExistsError, NightschoolError, OverloadedError
from nightschool_server.store import request_rows
from nightschool_server.store.redact import Redactor, redact_patterns
from nightschool_server.store.request_rows import Feedback, LoggedMessage, RequestRecord, StoredReply
from nightschool_server.store.store import Store

__all__ = ["Feedback", "LogCounts", "LoggedMessage", "RequestLog", "RequestRecord", "StoredReply"]

log = logging.getLogger(__name__)

MAX_GROUP = 256
"""Jobs of one transaction."""

GATHER_S = 0.05
"""How long a line that nobody waits for is held back, so that it shares a transaction with those that come after it."""

MAX_QUEUED_IMAGE_BYTES = 256 * 2**20
"""Of the lines that wait: a queue of few but heavy ones is full, too."""

SWEEP_EVERY_S = 3600.0
"""How often replies past their time are forgotten."""

KEEP_REPLIES_S = 24 * 3600.0
"""How long a repeated request_id gets the first one's answer."""


KEEP_UPLOADS_S = 24 * 3600.0
"""How long a blob that no request names is held for its caller."""


@dataclass(frozen=True)
class LogCounts:
    """Of rows, and of lines that did not become one."""

    num_requests: int
    num_feedback: int
    num_dropped: int
    """Lines lost because the queue was full or the disk refused them."""
    queue_length: int


@dataclass(frozen=True)
class _Job:
    """Something to do inside the writer's transaction."""

    run: Callable[[sqlite3.Connection], Any]
    record: RequestRecord | None = None
    """Whose images must be stored first."""
    done: Future[Any] | None = None
    """Set once the transaction is on the disk; None where nobody waits."""


class RequestLog:
    """The log of one store. Its methods may be called from any thread; the awaitable ones from any event loop."""

    def __init__(
        self,
        store: Store,
        queue_size: int = 1000,
        redactor: Redactor = redact_patterns,
        *,
        max_queued_image_bytes: int = MAX_QUEUED_IMAGE_BYTES,
        keep_uploads_s: float = KEEP_UPLOADS_S,
    ) -> None:
        self._store = store
        self._queue_size = queue_size
        self._max_image_bytes = max_queued_image_bytes
        self._redactor = redactor
        self._keep_uploads_s = keep_uploads_s
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._num_dropped = 0
        self._num_awaited = 0
        """Jobs in the queue whose callers wait."""
        self._image_bytes = 0
        self._thread = threading.Thread(target=self._run, name="request_log", daemon=True)
        self._thread.start()

    def offer(self, record: RequestRecord) -> bool:
        """Queue a line; False, and counted, where the queue is full. Never waits."""
        with self._wake:
            image_bytes = self._image_bytes + record.image_bytes
            if self._closing or len(self._jobs) >= self._queue_size or image_bytes > self._max_image_bytes:
                self._num_dropped += 1
                return False
            self._image_bytes = image_bytes
            self._jobs.append(self._writing(record, None))
            if len(self._jobs) in (
                1,
                MAX_GROUP,
            ):  # Waking the writer for each would take the interpreter from the engine.
                self._wake.notify()
            return True

    async def write(self, record: RequestRecord) -> None:
        """Write a line and return when it is on the disk. Not bounded by the queue's size: its callers wait.

        Raises AlreadyExistsError where the caller's request_id has a reply already.
        """
        await self._submit(lambda done: self._writing(record, done))

    async def feedback(self, feedback: Feedback) -> str:
        """Write feedback, durably, and return its id; see `request_rows.insert_feedback` for what it raises."""
        run = lambda db: request_rows.insert_feedback(self._store, db, feedback, self._redactor)  # noqa: E731
        return str(await self._submit(lambda done: _Job(run, None, done)))

    async def forget(self, caller: str) -> int:
        """Erase what was logged of a caller and what was derived from it. Returns how many requests."""
        run = lambda db: request_rows.delete_caller(self._store, db, caller)  # noqa: E731
        num_requests, images = await self._submit(lambda done: _Job(run, None, done))
        await asyncio.to_thread(self._store.delete_unused_blobs, images)
        await asyncio.to_thread(self._store.checkpoint)
        return int(num_requests)

    async def flush(self) -> None:
        """Return when everything that was queued before is on the disk."""
        await self._submit(lambda done: _Job(lambda db: None, None, done))

    def find_by_request_id(self, caller: str, request_id: str) -> StoredReply | None:
        """The reply that `caller` got under this key, if it is still kept."""
        return request_rows.find_reply(self._store, caller, request_id)

    def counts(self) -> LogCounts:
        """For the server's status."""
        row = self._store.query(
            "SELECT (SELECT COUNT(*) FROM requests) AS requests, (SELECT COUNT(*) FROM feedback) AS feedback"
        )[0]
        with self._wake:
            return LogCounts(row["requests"], row["feedback"], self._num_dropped, len(self._jobs))

    def close(self) -> None:
        """Write what is queued and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    async def _submit(self, make: Callable[[Future[Any]], _Job]) -> Any:
        done: Future[Any] = Future()
        with self._wake:
            if self._closing:
                raise OverloadedError("the server is shutting down: try again shortly")
            self._jobs.append(make(done))
            self._num_awaited += 1
            self._wake.notify()
        # A caller that is cancelled does not undo what it asked for.
        return await asyncio.shield(asyncio.wrap_future(done))

    def _writing(self, record: RequestRecord, done: Future[Any] | None) -> _Job:
        def run(db: sqlite3.Connection) -> None:
            try:
                request_rows.insert_request(db, request_rows.kept_of(record, self._redactor))
            except sqlite3.IntegrityError as error:
                raise AlreadyExistsError(f"request_id {record.request_id!r} was used before") from error

        return _Job(run, record, done)

    def _run(self) -> None:
        swept_at = float("-inf")
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._closing, SWEEP_EVERY_S)
                if self._jobs:
                    self._wake.wait_for(self._should_write, GATHER_S)
                group = [self._jobs.popleft() for _ in range(min(len(self._jobs), MAX_GROUP))]
                self._num_awaited -= sum(job.done is not None for job in group)
                self._image_bytes -= sum(job.record.image_bytes for job in group if job.record and not job.done)
                if not group and self._closing:
                    return
            if group:
                self._commit(group)
            if time.monotonic() - swept_at >= SWEEP_EVERY_S:
                swept_at = time.monotonic()
                self._sweep()

    def _should_write(self) -> bool:
        """Whether what is queued should not wait for more."""
        return self._closing or bool(self._num_awaited) or len(self._jobs) >= MAX_GROUP

    def _commit(self, group: list[_Job]) -> None:
        """One transaction; a job that fails takes its own rows back and no other's."""
        durable = any(job.done is not None for job in group)
        outcomes: list[tuple[Any, Exception | None]] = []
        try:
            self._store_images(group)
            self._store.connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with self._store.transaction() as db:
                outcomes = [_attempt(job, db) for job in group]
        except Exception as error:  # the boundary of the writer: a full disk must not end the thread
            log.error("event=log_write_failed num_jobs=%d error=%r", len(group), error)
            outcomes = [(None, error)] * len(group)
        for job, (result, failure) in zip(group, outcomes, strict=True):
            self._settle(job, result, failure)

    def _settle(self, job: _Job, result: Any, failure: Exception | None) -> None:
        if job.done is not None and not job.done.done():
            if failure is None:
                job.done.set_result(result)
            else:
                job.done.set_exception(failure)
        elif failure is not None:
            with self._wake:
                self._num_dropped += 1
            log.warning("event=log_line_dropped error=%r", failure)

    def _store_images(self, group: list[_Job]) -> None:
        for job in group:
            if job.record is not None and job.record.policy != "no_log":
                for data in job.record.images.values():
                    self._store.put_blob(data, request_rows.media_type_of(data))

    def _sweep(self) -> None:
        try:
            with self._store.transaction() as db:
                request_rows.delete_old_replies(db, time.time() - KEEP_REPLIES_S)
                request_rows.delete_old_holders(db, time.time() - self._keep_uploads_s)
            self._store.sweep_blobs()
        except (NightschoolError, sqlite3.Error, OSError) as error:
            log.warning("event=log_sweep_failed error=%r", error)


def _attempt(job: _Job, db: sqlite3.Connection) -> tuple[Any, Exception | None]:
    db.execute("SAVEPOINT job")
    try:
        result = job.run(db)
    except Exception as error:  # the boundary of one job
        db.execute("ROLLBACK TO job")
        db.execute("RELEASE job")
        return None, error
    db.execute("RELEASE job")
    return result, None
