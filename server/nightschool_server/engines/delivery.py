"""From the owner thread to the event loops: one wake-up per loop per step.

Owns the mailboxes that callers wait on. The owner thread collects what a step produced in an `Outbox`
and hands it over in one `call_soon_threadsafe` per event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeVar

from nightschool_server.engine import Delta, Scores

Item = Delta | Scores | BaseException
T = TypeVar("T")


class Mailbox:
    """What one request has produced and its caller has not taken yet. Lives on the caller's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        """Where the caller waits; None in the self-test, which has no caller."""
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """On the loop's thread: add an item and wake the caller."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[Delta | Scores]:
        """Everything there is, at least one item; raises an exception once what came before it was taken."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if isinstance(self._items[0], BaseException):
            raise self._items[0]
        taken: list[Delta | Scores] = []
        while self._items:
            item = self._items[0]
            if isinstance(item, BaseException):
                break
            taken.append(item)
            self._items.popleft()
        return taken


class Outbox:
    """What the owner thread has for the callers since it last sent."""

    def __init__(self) -> None:
        self._by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Item]]] = {}

    def put(self, mailbox: Mailbox, item: Item) -> None:
        """Add an item for a caller."""
        assert mailbox.loop is not None
        self._by_loop.setdefault(mailbox.loop, []).append((mailbox, item))

    def send(self) -> None:
        """Hand everything over; what was meant for a closed loop is dropped."""
        for loop, items in self._by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                # The loop closed while its requests ran: nobody waits for them any more.
                continue
        self._by_loop = {}


def resolve(future: asyncio.Future[T], value: T) -> None:
    """From the owner thread: answer a caller's future."""
    _call(future, lambda: None if future.done() else future.set_result(value))


def reject(future: asyncio.Future[T], error: BaseException) -> None:
    """From the owner thread: fail a caller's future."""
    _call(future, lambda: None if future.done() else future.set_exception(error))


def merge_deltas(deltas: list[Delta]) -> list[Delta]:
    """Deltas of the same answer joined: a caller that lags behind gets fewer, larger ones."""
    if len(deltas) == 1:
        return deltas
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [_joined(same) for same in by_index.values()]


def _joined(deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        index=deltas[0].index,
        text="".join(d.text for d in deltas),
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        logprobs=tuple(p for d in deltas for p in d.logprobs),
        top_logprobs=tuple(t for d in deltas for t in d.top_logprobs),
        finish_reason=deltas[-1].finish_reason,
        num_prompt_tokens=deltas[0].num_prompt_tokens,
        num_cached_tokens=deltas[0].num_cached_tokens,
    )


def _call(future: asyncio.Future[T], callback: object) -> None:
    try:
        future.get_loop().call_soon_threadsafe(callback)  # type: ignore[arg-type]
    except RuntimeError:
        return


def _deliver(items: list[tuple[Mailbox, Item]]) -> None:
    for mailbox, item in items:
        mailbox.put(item)
