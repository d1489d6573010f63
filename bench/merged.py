"""What the merged lane gains and what it costs: tokens per second, and logprobs against the unmerged way.

    python -m bench.merged [--model examples/shop/model] [--tokens 64] [--rounds 5] [--threads 1] [--quick]

Speed: the engine on the base model, on one rank-64 adapter as LoRA, and on the same adapter merged, at 1, 8 and 32
streams; the sides alternate within a round, in another order each, after one warm-up; greedy, the end token ignored,
prefill included. Ratios are of the sides of one round, in tokens per CPU second of this process (which hold on a
machine that others use) and per wall second. Also the time of a merge.

Rounding: answers are scored merged and not, on the adapter and on the base, each beside eight requests of the adapter,
in float32 and bfloat16. Every way has an engine of its own, so that none reads the other's prefixes.
Prints tables (median, min-max) and a last line of JSON.
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
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from nightschool_server.engine import BASE
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig
from transformers.utils import logging as transformers_logging

from bench.engine import Run, fast, make_adapter, prompt, timed

SIDES = {"base": (BASE, BASE), "adapter as LoRA": ("first", BASE), "adapter merged": ("first", "first")}
"""By name: the adapter of the requests, and the merged one."""
ANSWERS = (
    "There are seven red apples in the shop, and they cost three each.",
    "I look that up first: the price list says two for a pear and three for an apple.",
    "Nothing is left of them; ask again tomorrow, when the market has been.",
)
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Difference:
    """Of the logprobs of two ways to compute the same, nats a token."""

    dtype: Dtype
    what: str
    against: str
    mean: float
    largest: float
    num_tokens: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="examples/shop/model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one round of 8 tokens at 1 and 8 streams")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.rounds = 8, 1
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as home:
        adapter = make_adapter(arguments.model, Path(home) / "first", 0)
        asyncio.run(measure(arguments, adapter))


async def measure(arguments: argparse.Namespace, adapter: Path) -> None:
    """Both parts, their tables and the line of JSON."""
    streams = (1, 8) if arguments.quick else (1, 8, 32)
    runs, merges_ms = await speeds(arguments, adapter, streams)
    rows = [speed_row(runs, side, count) for side in SIDES for count in streams]
    print(
        f"\n{arguments.model}, {arguments.tokens} tokens, n={arguments.rounds}, threads={arguments.threads}, "
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print("| side | streams | tok/s | tok per CPU s | CPU, times base | CPU, times LoRA | wall, times LoRA |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    print(f"\na merge: median {statistics.median(merges_ms):.1f} ms ({min(merges_ms):.1f}-{max(merges_ms):.1f})\n")
    differences = await rounding(arguments, adapter)
    print("| dtype | what | against | mean, nats | largest, nats | tokens |")
    print("|---|---|---|---|---|---|")
    for one in differences:
        print(f"| {one.dtype} | {one.what} | {one.against} | {one.mean:.2g} | {one.largest:.2g} | {one.num_tokens} |")
    result = {"runs": rows, "merge_ms": merges_ms, "rounding": [asdict(one) for one in differences]}
    print(json.dumps({"model": arguments.model, "tokens": arguments.tokens, "rounds": arguments.rounds, **result}))


async def start(arguments: argparse.Namespace, adapter: Path, dtype: Dtype) -> TransformersEngine:
    """An engine with the adapter loaded."""
    config = TransformersEngineConfig(model=arguments.model, num_threads=arguments.threads, dtype=dtype)
    engine = await TransformersEngine.start(config)
    await engine.load_adapter("first", adapter)
    return engine


async def speeds(
    arguments: argparse.Namespace, adapter: Path, streams: tuple[int, ...]
) -> tuple[dict[tuple[str, int], list[Run]], list[float]]:
    """Runs by (side, streams), a warm-up left out, and the milliseconds of each merge."""
    engine = await start(arguments, adapter, "float32")
    runs: dict[tuple[str, int], list[Run]] = {}
    merges_ms: list[float] = []
    sides = list(SIDES.items())
    for round_ in range(arguments.rounds + 1):
        for count in streams:
            for side, (name, merged) in sides[round_ % 3 :] + sides[: round_ % 3]:
                began = time.perf_counter()
                await engine.merge_adapter(merged)
                if merged != BASE:
                    merges_ms.append(1000 * (time.perf_counter() - began))
                run = await timed(count, arguments.tokens, partial(fast, engine, (name,), arguments.tokens))
                runs.setdefault((side, count), []).append(run)
        print(f"round {round_} of {arguments.rounds}", flush=True)
    await engine.close()
    return {key: found[1:] for key, found in runs.items()}, merges_ms


def speed_row(runs: dict[tuple[str, int], list[Run]], side: str, streams: int) -> dict[str, object]:
    """Medians over the rounds; ratios [median, smallest, largest] of the runs of one round."""
    here, base, lora = (runs[name, streams] for name in (side, "base", "adapter as LoRA"))
    return {
        "side": side,
        "streams": streams,
        "tokens_per_s": _spread([run.tokens_per_s for run in here]),
        "tokens_per_cpu_s": _spread([run.tokens_per_cpu_s for run in here]),
        "cpu_times_base": _ratios([(a.tokens_per_cpu_s, b.tokens_per_cpu_s) for a, b in zip(here, base, strict=True)]),
        "cpu_times_lora": _ratios([(a.tokens_per_cpu_s, b.tokens_per_cpu_s) for a, b in zip(here, lora, strict=True)]),
        "wall_times_lora": _ratios([(a.tokens_per_s, b.tokens_per_s) for a, b in zip(here, lora, strict=True)]),
    }


async def rounding(arguments: argparse.Namespace, adapter: Path) -> list[Difference]:
    """How far each way is from the others: merged, unmerged in the same batch, unmerged alone, and that in float32."""
    exact: dict[str, list[float]] = {}
    differences: list[Difference] = []
    for dtype in ("float32", "bfloat16"):
        ways: list[dict[str, list[float]]] = []
        for merged_name, beside in ((BASE, 0), (BASE, 8), ("first", 8)):
            engine = await start(arguments, adapter, dtype)
            await engine.merge_adapter(merged_name)
            ways.append({name: await scores(engine, name, beside=beside) for name in ("first", BASE)})
            await engine.close()
        alone, batched, merged = ways
        exact = exact or alone
        for name, label in (("first", "adapter"), (BASE, "base")):
            differences += [
                _difference(dtype, f"{label}, merged", "unmerged, same batch", merged[name], batched[name]),
                _difference(dtype, f"{label}, unmerged", "unmerged, alone", batched[name], alone[name]),
                _difference(dtype, f"{label}, merged", "float32 alone", merged[name], exact[name]),
                _difference(dtype, f"{label}, unmerged", "float32 alone", batched[name], exact[name]),
            ]
    return differences


async def scores(engine: TransformersEngine, name: str, *, beside: int) -> list[float]:
    """Logprobs of all answers, each in one batch with `beside` other requests on the adapter."""
    found: list[float] = []
    for i in range(4):
        for answer in ANSWERS:
            others = (engine.score(prompt(100 + 8 * i + j), answer, adapter="first") for j in range(beside))
            one, *_ = await asyncio.gather(engine.score(prompt(i), answer, adapter=name), *others)
            found += one.logprobs
    return found


def _difference(dtype: Dtype, what: str, against: str, one: list[float], other: list[float]) -> Difference:
    found = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return Difference(dtype, what, against, statistics.mean(found), max(found), len(found))


def _ratios(pairs: list[tuple[float, float]]) -> list[float]:
    return [round(value, 2) for value in _median_and_range([a / b for a, b in pairs])]


def _spread(values: list[float]) -> list[int]:
    return [round(value) for value in _median_and_range(values)]


def _median_and_range(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _cell(value: object) -> str:
    return f"{value[0]:,} ({value[1]:,}-{value[2]:,})" if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
