"""What a call of an MCP server's tool costs beside one of a Python function: the shop's `price` and `calculator`.

    python bench/mcp_calls.py [--calls 1000]

Both through the registry that serving and practice use, one call after another and 64 at a time. The tools' own work is
next to nothing. The last line is JSON.
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
import statistics
import tempfile
import time

from nightschool_server.agent.toolbox import Toolbox, open_tools
from nightschool_server.app import load_app
from nightschool_server.chat import ToolCall
from nightschool_server.tools.state import ToolState

APP_REF = "examples.shop.app:app"
CALLS = {
    "mcp": ToolCall("call_0", "price", '{"item": "red mug"}'),
    "python": ToolCall("call_0", "calculator", '{"expression": "1 + 2"}'),
}
NUM_CONCURRENT = 64


async def timed_ms(tools: Toolbox, call: ToolCall, state: ToolState) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    outcome = await tools.run(call, state)
    assert not outcome.is_error, outcome.content
    return 1000 * (time.perf_counter() - began)


async def measure(tools: Toolbox, call: ToolCall, state: ToolState, num_calls: int) -> dict[str, float]:
    """Milliseconds of calls one after another, and for each of many at a time."""
    for _ in range(50):
        await timed_ms(tools, call, state)
    alone = [await timed_ms(tools, call, state) for _ in range(num_calls)]
    each = max(1, num_calls // NUM_CONCURRENT)

    async def caller() -> None:
        for _ in range(each):
            await timed_ms(tools, call, state)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(NUM_CONCURRENT)))
    together_ms = 1000 * (time.perf_counter() - began) / (each * NUM_CONCURRENT)
    p95 = statistics.quantiles(alone, n=20)[-1]
    return {"p50_ms": statistics.median(alone), "p95_ms": p95, "ms_per_call_of_64": together_ms}


async def main(num_calls: int) -> None:
    app = load_app(APP_REF)
    began = time.perf_counter()
    async with open_tools(app, APP_REF) as tools:
        start_s = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            state = ToolState.initial(app, Path(folder))
            found = {kind: await measure(tools, call, state, num_calls) for kind, call in CALLS.items()}
    for kind, numbers in found.items():
        print(kind, ", ".join(f"{name} {value:.2f}" for name, value in numbers.items()))
    rounded = {kind: {name: round(value, 3) for name, value in numbers.items()} for kind, numbers in found.items()}
    print(json.dumps({"start_s": round(start_s, 2), **rounded}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Calls of an MCP server's tool beside those of a Python function.")
    parser.add_argument("--calls", type=int, default=1000)
    asyncio.run(main(parser.parse_args().calls))
