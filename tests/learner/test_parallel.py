"""Several things at once, ended together: nothing of them runs on behind the one that they were for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from nightschool_learner.parallel import together


@dataclass
class Bench:
    """Work that ends when it is told to, and needs a while to leave its place."""

    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    busy: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once two works have begun."""
    num_begun: int = 0
    left: list[str] = field(default_factory=list)

    async def work(self, name: str, *, error: Exception | None = None) -> str:
        self.num_begun += 1
        if self.num_begun == 2:
            self.busy.set()
        try:
            await self.go_on.wait()
            if error is not None:
                raise error
            await asyncio.sleep(3600 if name == "slow" else 0)
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self.left.append(name)
        return name


async def test_results_come_in_the_order_of_the_works() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await together(after(5), after(0), after(2)) == [5, 0, 2]
    assert await together() == []


async def test_the_first_failure_is_raised_once_the_others_have_ended() -> None:
    bench = Bench()
    bench.go_on.set()
    with pytest.raises(ZeroDivisionError):
        await together(bench.work("slow"), bench.work("fails", error=ZeroDivisionError()), bench.work("quick"))
    assert sorted(bench.left) == ["fails", "quick", "slow"]


async def test_a_cancellation_waits_until_all_have_left() -> None:
    bench = Bench()
    working = asyncio.create_task(together(bench.work("a"), bench.work("b")))
    await bench.busy.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert sorted(bench.left) == ["a", "b"]
