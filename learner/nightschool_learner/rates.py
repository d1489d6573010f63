"""Keeping to an endpoint's limits: how much may begin in any minute, and when everybody has to wait.

Owns the arithmetic of waiting; who waits for what is `endpoint.py`'s. The clock and the sleep are given, so that a
test needs no real minute.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

WINDOW_S = 60.0

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


@dataclass
class Window:
    """At most `limit` in any WINDOW_S; first come, first served. A limit of 0 lets everything through."""

    limit: int
    clock: Clock = time.monotonic
    sleep: Sleep = asyncio.sleep
    _taken: deque[tuple[float, int]] = field(default_factory=deque)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, amount: int) -> None:
        """Return once `amount` may begin. One that is larger than the limit goes alone."""
        if not self.limit:
            return
        amount = min(amount, self.limit)
        async with self._turn:
            while (wait_s := self._wait_s(amount)) > 0:
                await self.sleep(wait_s)
            self._taken.append((self.clock(), amount))

    def correct(self, difference: int) -> None:
        """Add what a call came to beyond (or, below 0, short of) what was taken for it."""
        if self.limit and difference:
            self._taken.append((self.clock(), difference))

    def _wait_s(self, amount: int) -> float:
        """Seconds until enough of what was taken is older than the window; 0 where it fits now."""
        now = self.clock()
        while self._taken and self._taken[0][0] <= now - WINDOW_S:
            self._taken.popleft()
        over = sum(taken for _, taken in self._taken) + amount - self.limit
        for at, taken in self._taken:
            if over <= 0:
                return 0.0
            over -= taken
            if over <= 0:
                return at + WINDOW_S - now
        return 0.0


@dataclass
class Gate:
    """Shut for everybody until a moment, e.g. the one that an overloaded endpoint named."""

    clock: Clock = time.monotonic
    sleep: Sleep = asyncio.sleep
    _until: float = 0.0

    def shut(self, seconds: float) -> None:
        """Let nobody through for `seconds`, or longer where that was said before."""
        self._until = max(self._until, self.clock() + seconds)

    async def passed(self) -> None:
        """Return once it is open."""
        while (left_s := self._until - self.clock()) > 0:
            await self.sleep(left_s)
