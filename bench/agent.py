"""What the agent runtime costs per step, without the model's time and the tool's, and what it leaves behind.

    python bench/agent.py [--quick]

Runs episodes of a scripted model over the shop's tools, alone and 64 at a time. The last line is JSON:
`overhead_ms_p50` is the time of a step that calls one tool whose own work is next to nothing, run one after
another without a pause, so that the fork for the next call is never hidden behind a model;
`overhead_paused_ms_p50` is the same behind a model that takes 20 ms. `leaked_*` compare before and after.
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
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import psutil
from nightschool_server import chat
from nightschool_server.agent.loop import Episode, LiveActor, run_episode
from nightschool_server.agent.toolbox import Toolbox, open_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import App, load_app
from nightschool_server.engine import Delta, Prompt, Sampling
from nightschool_server.tools.state import ToolState

APP_REF = "examples.shop.app:app"
CALLS = tuple(write_call("calculator", {"expression": f"{n} + 2"}) for n in range(4))
NUM_CONCURRENT = 64


@dataclass
class Script:
    """A model that calls tools and then answers, and takes `pause_s` for each step."""

    pause_s: float
    position: int = 0
    paused_s: float = 0.0

    async def sample(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Delta]:
        if self.pause_s:
            started = time.perf_counter()
            await asyncio.sleep(self.pause_s)
            self.paused_s += time.perf_counter() - started
        text = CALLS[self.position] if self.position < len(CALLS) else "5"
        self.position += 1
        yield Delta(0, text, (1,) * 20, finish_reason="stop", num_prompt_tokens=100)


async def measure(app: App, tools: Toolbox, root: Path, pause_s: float) -> float:
    """Milliseconds of overhead for each tool step of one episode."""
    script = Script(pause_s)
    episode = Episode((chat.system(app.system_prompt), chat.user("2 + 2?")), ToolState.initial(app, root))
    started = time.perf_counter()
    result = await run_episode(episode, LiveActor(script, tools))
    assert (result.outcome, result.num_tool_errors) == ("answered", 0), result
    result.state.discard()
    return 1000 * (time.perf_counter() - started - script.paused_s) / len(CALLS)


async def main(num_episodes: int, num_workers: int) -> None:
    app = load_app(APP_REF)
    me = psutil.Process()
    await (await asyncio.create_subprocess_exec("true")).wait()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        before = len(me.children(recursive=True)), me.num_fds()
        started = time.perf_counter()
        async with open_tools(app, APP_REF, num_workers=num_workers) as tools:
            start_s = time.perf_counter() - started
            await measure(app, tools, root, 0.0)
            alone = [await measure(app, tools, root, 0.0) for _ in range(num_episodes)]
            paused = [await measure(app, tools, root, 0.02) for _ in range(num_episodes // 4)]
            started = time.perf_counter()
            for _ in range(max(1, num_episodes // NUM_CONCURRENT)):
                await asyncio.gather(*(measure(app, tools, root, 0.0) for _ in range(NUM_CONCURRENT)))
            steps = max(1, num_episodes // NUM_CONCURRENT) * NUM_CONCURRENT * len(CALLS)
            steps_per_s = steps / (time.perf_counter() - started)
        left = len(os.listdir(root))
        after = len(me.children(recursive=True)), me.num_fds()
    report("one tool step, one after another", alone)
    report("one tool step, behind a model of 20 ms", paused)
    print(f"{NUM_CONCURRENT} episodes at a time on {num_workers} workers: {steps_per_s:.0f} tool steps/s")
    print(f"workers started in {start_s * 1000:.0f} ms")
    result = {
        "overhead_ms_p50": round(statistics.median(alone), 3),
        "overhead_paused_ms_p50": round(statistics.median(paused), 3),
        "steps_per_s": round(steps_per_s),
        "leaked_processes": after[0] - before[0],
        "leaked_fds": after[1] - before[1],
        "leaked_folders": left,
    }
    print(json.dumps(result))


def report(what: str, values: Sequence[float]) -> None:
    """A line with the median and the 95th percentile."""
    print(f"{what}: p50 {statistics.median(values):.2f} ms, p95 {statistics.quantiles(values, n=20)[-1]:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Overhead of the agent runtime per step.")
    parser.add_argument("--quick", action="store_true", help="fewer episodes")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    asyncio.run(main(100 if given.quick else 1000, given.workers))
