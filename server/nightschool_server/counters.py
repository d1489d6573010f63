"""Calls by number: how many were served and failed, how many are in flight, and when none is.

Owns the places of calls in flight, each kind apart, so that practice and administration never take a live call's.
"""

from __future__ import annotations

import asyncio
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
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self, kind: Kind) -> None:
        """One call more."""
        self.num_in_flight[kind] += 1
        self._idle.clear()

    def leave(self, kind: Kind) -> None:
        """One call less."""
        self.num_in_flight[kind] -= 1
        if self._is_idle():
            self._idle.set()

    async def idle(self) -> None:
        """Returns when no call is in flight but those that only watch."""
        if not self._is_idle():
            await self._idle.wait()

    def _is_idle(self) -> bool:
        return not any(count for kind, count in self.num_in_flight.items() if kind != "watch")


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
