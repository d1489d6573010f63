"""What the agent runtime costs per step, without the model's time and the tool's, and what it leaves behind.

    python bench/agent.py [--quick]

Runs episodes of a scripted model over Python functions that do nothing, in worker processes. The last line is JSON:

- `overhead_ms_p50`: 64 episodes at a time, each behind a model of its own that takes 0.5 to 1.5 s for a step, drawn
  from a seed: about 64 tool steps a second in all, as many as 64 streams of a served model ask for;
- `overhead_alone_ms_p50`: one episode after another behind a model that takes no time, so that the fork for the next
  call is never hidden; `overhead_paused_ms_p50`: the same behind a model of 20 ms;
- `steps_per_s`: 64 episodes at a time behind models that take no time, which is what the workers can do at most;
- `cpu_ms_per_step`: of this process and the workers, in that last run: it moves least with what else the machine does;
- `shop_ms_p50`, `shop_alone_ms_p50`: the first two of the shop's functions, whose own work is some look-ups in memory
  that their process has to copy first;
- `four_calls_ms_p50` and `four_calls_in_order_ms_p50`: a step of four calls that change nothing, and of 10 ms each;
- `leaked_*`: processes, file descriptors and folders of workspaces, before and after.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script: its folder's names (logging) must not hide packages, and `bench` must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import psutil
from nightschool_server import chat
from nightschool_server.agent.episode import DEFAULT_LIMITS, Episode, Limits, Step
from nightschool_server.agent.loop import LiveActor, run_episode
from nightschool_server.agent.toolbox import Toolbox, open_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import App, load_app
from nightschool_server.engine import Delta, Prompt, Sampling
from nightschool_server.tools.state import ToolState

from bench.agent_app import app as nothing

SHOP = "examples.shop.app:app"
NOTHING = "bench.agent_app:app"
STEPS = tuple(write_call("look" if number % 2 else "keep", {"number": number}) for number in range(4))
SHOP_STEPS = (
    write_call("calculator", {"expression": "1 + 2"}),
    write_call("reserve", {"item": "black bowl", "quantity": 2}),
    write_call("basket_total", {}),
    write_call("calculator", {"expression": "3 * (4 - 1)"}),
)
NAPS = (write_call("nap", {"ms": 10}) * 4,) * 4
NUM_CONCURRENT = 64


@dataclass
class Script:
    """A model that calls tools and then answers, and takes `pause_s()` for each step."""

    steps: Sequence[str]
    pause_s: Callable[[], float]
    position: int = 0
    paused_s: float = 0.0

    async def sample(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Delta]:
        if pause_s := self.pause_s():
            started = time.perf_counter()
            await asyncio.sleep(pause_s)
            self.paused_s += time.perf_counter() - started
        text = self.steps[self.position] if self.position < len(self.steps) else "5"
        self.position += 1
        yield Delta(0, text, (1,) * 20, finish_reason="stop", num_prompt_tokens=100)


@dataclass
class TimedActor:
    """An actor that notes what each tool step took beside its model."""

    actor: LiveActor
    script: Script
    overheads_ms: list[float] = field(default_factory=list)

    async def act(self, episode: Episode) -> Step:
        started, paused_s = time.perf_counter(), self.script.paused_s
        step = await self.actor.act(episode)
        if not step.final:
            took_s = time.perf_counter() - started - (self.script.paused_s - paused_s)
            self.overheads_ms.append(1000 * took_s)
        return step


@dataclass(frozen=True)
class Bench:
    """The tools of an application, and where workspaces are made."""

    app: App
    tools: Toolbox
    root: Path
    steps: Sequence[str] = STEPS

    async def episode(self, pause_s: Callable[[], float] = lambda: 0.0, limits: Limits = DEFAULT_LIMITS) -> list[float]:
        """Milliseconds of overhead of each tool step of one episode."""
        script = Script(self.steps, pause_s)
        actor = TimedActor(LiveActor(script, self.tools), script)
        begun = Episode((chat.system(self.app.system_prompt), chat.user("?")), self.state(), limits)
        result = await run_episode(begun, actor)
        assert (result.outcome, result.num_tool_errors) == ("answered", 0), result
        result.state.discard()
        return actor.overheads_ms

    def state(self) -> ToolState:
        """Where a task begins."""
        return ToolState.initial(self.app, self.root)

    async def together(self, pause_s: Callable[[], float] = lambda: 0.0) -> list[float]:
        """The same of `NUM_CONCURRENT` episodes at a time."""
        all_ms = await asyncio.gather(*(self.episode(pause_s) for _ in range(NUM_CONCURRENT)))
        return [ms for of_one in all_ms for ms in of_one]

    async def in_turn(self, num_episodes: int, pause_s: Callable[[], float] = lambda: 0.0) -> list[float]:
        """The same of so many episodes one after another."""
        return [ms for _ in range(num_episodes) for ms in await self.episode(pause_s)]


async def of_functions(bench: Bench, num_episodes: int) -> dict[str, float]:
    """The runs over functions that do nothing."""
    live, alone = await live_and_alone(bench, num_episodes)
    num_rounds = max(1, num_episodes // NUM_CONCURRENT)
    paused = await bench.in_turn(num_episodes // 4, lambda: 0.02)
    started, cpu_s = time.perf_counter(), cpu_of_all_s()
    most = [ms for _ in range(num_rounds) for ms in await bench.together()]
    wall_s, cpu_s = time.perf_counter() - started, cpu_of_all_s() - cpu_s
    report(f"{NUM_CONCURRENT} episodes at a time, each behind a model of 1 s", live)
    report("one after another", alone)
    report("one after another, behind a model of 20 ms", paused)
    print(f"{NUM_CONCURRENT} episodes at a time: {len(most) / wall_s:.0f} tool steps/s")
    return {
        "overhead_ms_p50": round(statistics.median(live), 3),
        "overhead_alone_ms_p50": round(statistics.median(alone), 3),
        "overhead_paused_ms_p50": round(statistics.median(paused), 3),
        "steps_per_s": round(len(most) / wall_s),
        "cpu_ms_per_step": round(1000 * cpu_s / len(most), 3),
    }


async def live_and_alone(bench: Bench, num_episodes: int) -> tuple[list[float], list[float]]:
    """Overheads of many episodes at a time behind models of a second, and of one after another."""
    await bench.in_turn(1)
    draw, num_rounds = random.Random(7), max(1, num_episodes // NUM_CONCURRENT)
    live = [ms for _ in range(num_rounds) for ms in await bench.together(lambda: draw.uniform(0.5, 1.5))]
    return live, await bench.in_turn(num_episodes)


async def of_shop(bench: Bench, num_episodes: int) -> dict[str, float]:
    """The runs over the shop's functions."""
    live, alone = await live_and_alone(bench, num_episodes)
    report(f"the shop's functions, {NUM_CONCURRENT} episodes at a time, each behind a model of 1 s", live)
    report("the shop's functions, one after another", alone)
    return {
        "shop_ms_p50": round(statistics.median(live), 3),
        "shop_alone_ms_p50": round(statistics.median(alone), 3),
    }


async def of_naps(bench: Bench, num_episodes: int) -> dict[str, float]:
    """The runs over a function that takes 10 ms, four calls a step."""
    found = {}
    for name, width in (("four_calls_ms_p50", 4), ("four_calls_in_order_ms_p50", 1)):
        limits = Limits(max_parallel_calls=width)
        steps = [ms for _ in range(num_episodes // 20) for ms in await bench.episode(limits=limits)]
        report(f"four calls of 10 ms, at most {width} side by side", steps)
        found[name] = round(statistics.median(steps), 3)
    return found


async def main(num_episodes: int, num_workers: int) -> None:
    shop = replace(load_app(SHOP), mcp=(), tool_order=())  # Functions alone.
    me = psutil.Process()
    await (await asyncio.create_subprocess_exec("true")).wait()
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        before = len(me.children(recursive=True)), me.num_fds()
        started = time.perf_counter()
        async with open_tools(nothing, NOTHING, num_workers=num_workers) as tools:
            print(f"{num_workers} workers started in {1000 * (time.perf_counter() - started):.0f} ms")
            result |= await of_functions(Bench(nothing, tools, root), num_episodes)
        async with open_tools(shop, SHOP, num_workers=num_workers) as tools:
            result |= await of_shop(Bench(shop, tools, root, SHOP_STEPS), num_episodes)
        async with open_tools(nothing, NOTHING, num_workers=4) as tools:
            result |= await of_naps(Bench(nothing, tools, root, NAPS), num_episodes)
        left = len(os.listdir(root))
        after = len(me.children(recursive=True)), me.num_fds()
    leaked = {
        "leaked_processes": after[0] - before[0],
        "leaked_fds": after[1] - before[1],
        "leaked_folders": left,
    }
    print(json.dumps(result | leaked))


def cpu_of_all_s() -> float:
    """Processor time of this process, its workers and the calls that have ended."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (me, *me.children()))


def report(what: str, values: Sequence[float]) -> None:
    """A line with the median and the 95th percentile."""
    p95 = statistics.quantiles(values, n=20)[-1]
    print(f"{what}: p50 {statistics.median(values):.2f} ms, p95 {p95:.2f} ms, n {len(values)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Overhead of the agent runtime per step.")
    parser.add_argument("--quick", action="store_true", help="fewer episodes")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    asyncio.run(main(128 if given.quick else 512, given.workers))
