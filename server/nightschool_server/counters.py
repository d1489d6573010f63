"""Calls by number: how many were served and failed, how many are in flight, and when none is.

Owns the places of calls in flight, each kind apart, so that practice and administration never take a live call's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from nightschool_server.errors import OverloadedError

Kind = Literal["live", "practice", "admin", "watch"]
"""What a call counts as; each kind has places of its own."""


@dataclass
class Counters:
    """Of AgentService calls since the server started."""

    num_served: int = 0
    num_failed: int = 0
    """Ended by a fault of the server, not by a mistake of the caller; see `status.SERVER_FAULTS`."""
    num_in_flight: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(get_args(Kind), 0))
    is_lent: bool = False
    """The engine's device is lent to a trainer, or about to be: new calls of the model are refused."""
    _left: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self, kind: Kind) -> None:
        """One call more."""
        self.num_in_flight[kind] += 1

    def leave(self, kind: Kind) -> None:
        """One call less."""
        self.num_in_flight[kind] -= 1
        self._left.set()

    async def idle(self, kinds: Sequence[Kind] = ("live", "practice", "admin")) -> None:
        """Returns when no call of these kinds is in flight; those that only watch hold nothing up."""
        while any(self.num_in_flight[kind] for kind in kinds):
            self._left.clear()
            await self._left.wait()


class Slot:
    """One call in flight of its kind, for as long as the block runs."""

    def __init__(self, counters: Counters, kind: Kind, limit: int) -> None:
        self._counters, self._kind, self._limit = counters, kind, limit

    def __enter__(self) -> None:
        if self._counters.num_in_flight[self._kind] >= self._limit:
            raise OverloadedError(
                f"{self._limit} {self._kind} calls are in flight already (server.max_concurrent_requests): "
                "try again shortly"
            )
        self._counters.enter(self._kind)

    def __exit__(self, *_: object) -> None:
        self._counters.leave(self._kind)
