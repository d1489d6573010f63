"""Requests with an idempotency key: a repeat gets the first one's answer, two at once share one execution.

Owns who leads among calls in flight. Where answers are kept is the caller's; a reply that may not be kept (NO_LOG) is
shared only while it is being made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nightschool_server.errors import AlreadyExistsError


@dataclass(frozen=True)
class Answered:
    """What the log holds of a request that was answered."""

    digest: str
    response: bytes


Find = Callable[[], Awaitable[Answered | None]]
"""What was answered before, if anything was."""


@dataclass
class Claim:
    """The right to answer a request, or the answer that it has already."""

    response: bytes | None
    """Set at entry: send this. None: make the reply, and set it when it is made."""


@dataclass(frozen=True)
class _Running:
    digest: str
    done: asyncio.Future[bytes | None]
    """None when the leader failed or was cancelled: the next one leads."""


class Repeats:
    """The requests in flight by (caller, request_id)."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], _Running] = {}

    @asynccontextmanager
    async def claim(self, caller: str, request_id: str, digest: str, find: Find) -> AsyncIterator[Claim]:
        """Lead the request or get its answer; waits for a leader in flight.

        Raises AlreadyExistsError where the id was used for a different request.
        """
        key = (caller, request_id)
        while (running := self._running.get(key)) is not None:
            _check(request_id, digest, running.digest)
            response = await asyncio.shield(running.done)
            if response is not None:
                yield Claim(response)
                return
        lead = self._running[key] = _Running(digest, asyncio.get_running_loop().create_future())
        claim = Claim(None)
        try:
            answered = await find()
            if answered is not None:
                _check(request_id, digest, answered.digest)
                claim.response = answered.response
            yield claim
        finally:
            del self._running[key]
            lead.done.set_result(claim.response)


def _check(request_id: str, digest: str, first_digest: str) -> None:
    if digest != first_digest:
        raise AlreadyExistsError(
            f"request_id {request_id!r} was used for a different request: use a fresh one for every new request"
        )
