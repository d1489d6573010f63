"""How long practice works, how much of that it waits for the engine, and how busy the engine is meanwhile.

Owns the clocks behind the counts CLOCKS of `explore`. A paused learner's time does not count. Clocks go on over
restarts: the counts of the stage's row hold them, and what passed since they were last written is lost with a killed
learner.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from nightschool_server.engine import Prompt, Sampling

from nightschool_learner.sampling import AnswerSampler, Samples
from nightschool_learner.stages import Progress

CLOCKS = ("wall_ms", "asking_ms", "watched_ms", "busy_ms")
"""Of practice; of it with a call to a model in flight; with the engine in sight; of that with the engine working."""
TICK_S = 2.0

ReadBusy = Callable[[], Awaitable[float | None]]
"""The engine's own clock, seconds; None where it cannot be read now."""


async def unseen() -> float | None:
    """The clock of an engine that nobody can look at."""
    return None


@dataclass
class Meter:
    """The clocks of one stage."""

    progress: Progress
    """Its counts are what earlier processes measured, once the stage has begun."""
    resumed: asyncio.Event
    read_busy_s: ReadBusy = unseen
    clock: Callable[[], float] = time.monotonic
    _seconds: dict[str, float] = field(default_factory=dict)
    _marked_at: float | None = None
    """None while nothing counts."""
    _num_asking: int = 0
    _asking_since: float = 0.0
    _asked_s: float = 0.0
    """Since the last mark, of waits that are over."""
    _seen: tuple[float, float] | None = None
    """When the engine's clock was last read, and what it said."""

    @property
    def wall_s(self) -> float:
        """How long practice has worked, earlier processes included."""
        since = 0.0 if self._marked_at is None else self.clock() - self._marked_at
        return self._total("wall_ms") + since

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Measure while the block runs."""
        self._marked_at = self._asking_since = self.clock()
        self._asked_s = 0.0
        await self._look()
        ticking = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
            self._mark()
            self._marked_at = None
        await self._look()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """A call to a model is in flight while the block runs."""
        if not self._num_asking:
            self._asking_since = self.clock()
        self._num_asking += 1
        try:
            yield
        finally:
            self._num_asking -= 1
            if not self._num_asking:
                self._asked_s += self.clock() - self._asking_since

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._mark()
            await self._look()

    def _mark(self) -> None:
        """Add what passed since the last mark; nothing of it where the learner is paused."""
        now = self.clock()
        asked_s = self._asked_s + (now - self._asking_since if self._num_asking else 0.0)
        if self._marked_at is not None and self.resumed.is_set():
            self._add(wall_ms=now - self._marked_at, asking_ms=min(asked_s, now - self._marked_at))
        self._marked_at, self._asking_since, self._asked_s = now, now, 0.0

    async def _look(self) -> None:
        """Read the engine's clock. One that went back belongs to an engine that was started again."""
        busy_s = await self.read_busy_s()
        now = self.clock()
        if busy_s is not None and self._seen is not None and busy_s >= self._seen[1] and self.resumed.is_set():
            self._add(watched_ms=now - self._seen[0], busy_ms=busy_s - self._seen[1])
        self._seen = None if busy_s is None else (now, busy_s)

    def _add(self, **seconds: float) -> None:
        for name, value in seconds.items():
            self._seconds[name] = self._total(name) + value
        self.progress.put(**{name: round(1000 * self._seconds[name]) for name in seconds})

    def _total(self, name: str) -> float:
        return self._seconds.get(name, self.progress.counts.get(name, 0) / 1000)


@dataclass(frozen=True)
class MeteredSampler:
    """An `AnswerSampler` whose calls a meter sees."""

    sampler: AnswerSampler
    meter: Meter

    async def sample(self, prompt: Prompt, sampling: Sampling, *, adapter: str) -> Samples:
        with self.meter.asking():
            return await self.sampler.sample(prompt, sampling, adapter=adapter)


def clocks_of(counts: Mapping[str, int]) -> dict[str, int]:
    """The clocks among a stage's counts, for the next process to go on from."""
    return {name: counts[name] for name in CLOCKS if name in counts}
