"""The clocks of practice, with a clock that a test moves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from nightschool_learner.meter import Meter, MeteredSampler, clocks_of
from nightschool_learner.stages import Progress
from nightschool_server.chat import user
from nightschool_server.engine import Prompt, Sampling

from tests.learner.practice_home import FakeSampler


@dataclass
class World:
    """Time, and an engine that says how long it has worked."""

    now: float = 100.0
    busy_s: float | None = 40.0
    progress: Progress = field(default_factory=lambda: Progress("explore", lambda _: None))
    resumed: asyncio.Event = field(default_factory=asyncio.Event)

    def meter(self) -> Meter:
        async def read() -> float | None:
            return self.busy_s

        return Meter(self.progress, self.resumed, read, lambda: self.now)

    def passes(self, seconds: float, busy_s: float = 0.0) -> None:
        self.now += seconds
        if self.busy_s is not None:
            self.busy_s += busy_s


@pytest.fixture
def world() -> World:
    made = World()
    made.resumed.set()
    return made


async def test_practice_waits_for_the_engine_and_for_other_things(world: World) -> None:
    meter = world.meter()
    async with meter.running():
        world.passes(1.0)
        with meter.asking():
            world.passes(2.0, busy_s=1.5)
            with meter.asking():
                world.passes(4.0, busy_s=4.0)
        world.passes(1.0)
        assert meter.wall_s == 8.0
    assert clocks_of(world.progress.counts) == {"wall_ms": 8000, "asking_ms": 6000, "watched_ms": 8000, "busy_ms": 5500}
    world.passes(50.0)
    assert meter.wall_s == 8.0, "nothing counts outside the block"


async def test_clocks_go_on_from_what_an_earlier_process_wrote(world: World) -> None:
    world.progress.counts.update({"wall_ms": 3000, "busy_ms": 1000, "watched_ms": 2000, "asking_ms": 10})
    meter = world.meter()
    assert meter.wall_s == 3.0
    async with meter.running():
        world.passes(1.0, busy_s=0.5)
    assert clocks_of(world.progress.counts) == {"wall_ms": 4000, "asking_ms": 10, "watched_ms": 3000, "busy_ms": 1500}


async def test_a_paused_learner_does_not_practise(world: World) -> None:
    meter = world.meter()
    async with meter.running():
        world.resumed.clear()
        world.passes(60.0, busy_s=60.0)
    assert world.progress.counts == {}


async def test_an_engine_out_of_sight_or_started_again_is_left_out_of_the_share(world: World) -> None:
    world.busy_s = None
    async with world.meter().running():
        world.passes(5.0)
        world.busy_s = 1.0
    assert world.progress.counts == {"wall_ms": 5000, "asking_ms": 0}
    async with world.meter().running():
        world.passes(5.0)
        world.busy_s = 0.5
    assert clocks_of(world.progress.counts) == {"wall_ms": 10000, "asking_ms": 0}


async def test_a_metered_sampler_answers_as_the_one_inside_and_is_seen_while_it_does(world: World) -> None:
    meter = world.meter()

    def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
        world.passes(3.0)
        return f"answer {index}"

    async with meter.running():
        samples = await MeteredSampler(FakeSampler(said), meter).sample(
            Prompt((user("?"),)), Sampling(n=2), adapter="a"
        )
    assert [answer.text for answer in samples.answers] == ["answer 0", "answer 1"]
    assert world.progress.counts["asking_ms"] == 6000
