"""What a step of code costs beside the code: the start of its sandbox, and its end.

    python bench/sandbox.py [--rounds 50]

Prints milliseconds of an empty step, of one with a variable that is kept, and of one with ten calls of a tool; the last
line is JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script: its folder's names (logging) must not hide packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from typing import Any

from nightschool_server.config.code import CodeConfig
from nightschool_server.sandbox.proof import open_sandbox
from nightschool_server.sandbox.sandbox import CodeStep, Function, Reply

STEPS = {"empty": "None", "variables": "x = x + 1 if 'x' in globals() else 0", "ten_calls": "for _ in range(10): f()"}


async def answer(name: str, arguments: Any) -> Reply:
    """A tool that costs nothing."""
    return Reply("1", False, True)


async def measure(rounds: int) -> dict[str, float]:
    """Median milliseconds of each step."""
    found = {}
    async with open_sandbox(CodeConfig()) as sandbox:
        with tempfile.TemporaryDirectory() as root:
            workspace = Path(tempfile.mkdtemp(dir=root))
            for name, code in STEPS.items():
                times, variables = [], b""
                for _ in range(rounds):
                    began = time.perf_counter()
                    step = CodeStep(code, [Function("f", "f", ())], variables, workspace, 4000)
                    result = await sandbox.run(step, answer, 60)
                    times.append((time.perf_counter() - began) * 1000)
                    assert not result.fault, result.fault
                    variables = result.variables
                p50 = statistics.median(times)
                found[f"{name}_ms_p50"] = round(p50, 1)
                print(f"{name}: p50 {p50:.1f} ms, {min(times):.1f} to {max(times):.1f} ms, n = {rounds}")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    print(json.dumps(asyncio.run(measure(parser.parse_args().rounds))))


if __name__ == "__main__":
    main()
