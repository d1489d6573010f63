"""What serving costs: nightschool over gRPC beside `vllm serve` over HTTP and vLLM's engine without a server.

    python bench/serving.py [--quick] [--model DIR] [--sides nightschool,vllm_serve,raw,transformers,vllm_grpc]
        [--streams 1,8,32] [--rounds 5] [--tokens 64] [--requests 4] [--dtype bfloat16] [--log] [--no-pin]
        [--smg DIR] [--out FILE]
    python bench/serving.py --sides nightschool,unpinned       # what pinning does

Sides: `nightschool` (--engine vllm), `transformers` (nightschool on that engine), `vllm_serve` (vLLM's OpenAI server),
`raw` (vLLM's AsyncLLM driven in its own process, the limit), `vllm_grpc` (vLLM's own gRPC server: token ids in and out,
no adapters; reported as not installed where smg-grpc-servicer is neither in the environment nor in the folder `--smg`,
made by `pip install --no-deps --target DIR smg-grpc-servicer smg-grpc-proto`), and only where named `unpinned`
(nightschool with engine.pin_cores = false). Every side is a process of its own with the same model, messages, batch,
context, cache and dtype; greedy, the end token ignored, `--requests` of each stream one after another. Prompts are new
in every block, so that only the common system part may come from a cache.

`base`: the base model is active. `adapter`: one adapter of rank 64; nightschool has it promoted and merged, the sides
of vLLM are asked for it by name and have it as LoRA. LoRA is switched on on every side in both. Nightschool keeps
nothing of the requests (NO_LOG) unless `--log`.

All servers are up at once and the sides alternate within a block of a round, in another order each round, after one
round that does not count. An idle vLLM uses 0.01 cores, but 0.15 to 0.35 in the 3 seconds after its start (measured on
2 cores; `idle_cores` of the result is the latter). To be safe from what it does after work, the processes of a side are
stopped (SIGSTOP) while another one is measured, and one short request wakes them up. vLLM's EngineCore is pinned to its
worker's core on up to 4 cores, as nightschool does by itself; with `--no-pin` it is on no side.

Tokens are counted by the servers; pieces of text are timed at the client. The CPU seconds of `raw` are its client's
too. Prints rows (median, min-max over the rounds) and a last line of JSON; ratios are medians over the rounds of ratios
within one round. Above 1 is good for nightschool, but for the time to the first token and CPU, where below 1 is.
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
import signal
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from typing import Any

from bench import tree, vllm_grpc
from bench.load import Job, Numbers, quantile, spread, spreads, summary
from bench.sides import MAX_STREAMS, Nightschool, Raw, Setting, Side, VLLMServe

SIDES: dict[str, Callable[[Setting], Side]] = {
    "nightschool": lambda setting: Nightschool(setting, "vllm"),
    "vllm_serve": VLLMServe,
    "raw": Raw,
    "transformers": lambda setting: Nightschool(setting, "transformers"),
    "vllm_grpc": vllm_grpc.VLLMGrpc,
    "unpinned": lambda setting: Nightschool(replace(setting, pin=False), "vllm"),
}
LANES = ("base", "adapter")
IDLE_S = 3.0
RATIOS = {
    "base_vs_vllm_serve": (("nightschool", "base"), ("vllm_serve", "base"), "tokens_per_s"),
    "base_vs_raw_engine": (("nightschool", "base"), ("raw", "base"), "tokens_per_s"),
    "adapter_vs_base": (("nightschool", "adapter"), ("nightschool", "base"), "tokens_per_s"),
    "adapter_vs_vllm_serve": (("nightschool", "adapter"), ("vllm_serve", "adapter"), "tokens_per_s"),
    "ttft_vs_vllm_serve": (("nightschool", "base"), ("vllm_serve", "base"), "ttft_p50_ms"),
    "adapter_ttft_vs_vllm_serve": (("nightschool", "adapter"), ("vllm_serve", "adapter"), "ttft_p50_ms"),
    "cpu_vs_vllm_serve": (("nightschool", "base"), ("vllm_serve", "base"), "server_cpu_s_per_1k"),
    "base_vs_vllm_grpc": (("nightschool", "base"), ("vllm_grpc", "base"), "tokens_per_s"),
    "ttft_vs_vllm_grpc": (("nightschool", "base"), ("vllm_grpc", "base"), "ttft_p50_ms"),
    "pinned_vs_unpinned": (("nightschool", "base"), ("unpinned", "base"), "tokens_per_s"),
    "ttft_pinned_vs_unpinned": (("nightschool", "base"), ("unpinned", "base"), "ttft_p50_ms"),
    "transformers_vs_vllm_serve": (("transformers", "base"), ("vllm_serve", "base"), "tokens_per_s"),
}
Runs = dict[tuple[str, str, int], list[Numbers]]
"""By side, lane and streams, one of each round."""


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        from bench.tiny import make_adapter, make_model

        model = arguments.model or str(make_model(Path(folder) / "model"))
        adapter = make_adapter(model, Path(folder) / "first", 0)
        setting = Setting(model, adapter, arguments.dtype, arguments.log, arguments.pin)
        runs, facts = asyncio.run(measure(arguments, setting))
    report(arguments, runs, facts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of 1 and 8 streams, 16 tokens, 2 requests")
    parser.add_argument("--model", default="", help="a model folder (default: a tiny one made on the spot)")
    parser.add_argument("--sides", default="nightschool,vllm_serve,raw,transformers,vllm_grpc")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4, help="of each stream in a block")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--log", action="store_true", help="nightschool logs the requests")
    parser.add_argument("--no-pin", action="store_false", dest="pin", help="leave vLLM's processes where they are")
    parser.add_argument("--smg", default="", help="folder with smg-grpc-servicer and smg-grpc-proto, for vllm_grpc")
    parser.add_argument("--out", type=Path, help="file for all results, JSON")
    found = parser.parse_args()
    if found.quick:
        found.rounds, found.streams, found.tokens, found.requests = 1, "1,8", 16, 2
    found.sides = found.sides.split(",")
    found.streams = [int(count) for count in found.streams.split(",")]
    unknown = set(found.sides) - set(SIDES)
    if unknown:
        parser.error(f"--sides has {', '.join(sorted(unknown))}: it takes {', '.join(SIDES)}")
    if found.smg:
        sys.path.append(found.smg)
    if max(found.streams) > MAX_STREAMS:
        parser.error(f"--streams is above {MAX_STREAMS}, the batch of every side")
    return found


async def measure(arguments: argparse.Namespace, setting: Setting) -> tuple[Runs, dict[str, Any]]:
    """Every block of every round, and what is said of each side once."""
    facts: dict[str, Any] = {}
    sides: dict[str, Side] = {}
    async with AsyncExitStack() as stack:
        for name in arguments.sides:
            if name == "vllm_grpc" and not vllm_grpc.is_installed():
                facts[name] = "not installed"
                print(f"{name}: {facts[name]}; see --smg", flush=True)
                continue
            sides[name] = SIDES[name](setting)
            stack.push_async_callback(sides[name].close)
            await sides[name].start()
            facts[name] = {"startup_s": round(sides[name].startup_s, 1), "idle_cores": await idle_cores(sides[name])}
            tree.pause(sides[name].pid)
            print(f"{name}: {facts[name]}", flush=True)
        runs: Runs = {}
        for round_ in range(arguments.rounds + 1):
            for lane in LANES:
                await take(sides, lane)
                for streams in arguments.streams:
                    job = Job(f"{round_:02d}-{lane}-{streams:02d}", streams, arguments.tokens, arguments.requests)
                    for name in _turned([n for n in sides if able(sides[n], lane)], round_):
                        runs.setdefault((name, lane, streams), []).append(await block(sides[name], job))
            print(f"round {round_} of {arguments.rounds}", flush=True)
    return {key: found[1:] for key, found in runs.items()}, facts


async def take(sides: dict[str, Side], lane: str) -> None:
    """Have every side answer by the base model or the adapter from now on."""
    for side in (side for side in sides.values() if able(side, lane)):
        tree.resume(side.pid)
        await side.take(lane == "adapter")
        tree.pause(side.pid)


def able(side: Side, lane: str) -> bool:
    """Whether the side has the lane."""
    return side.has_adapter or lane == "base"


async def block(side: Side, job: Job) -> Numbers:
    """One side under one job, woken up before and stopped after."""
    tree.resume(side.pid)
    try:
        await side.run(replace(job, key=f"{job.key}-wake", streams=1, tokens=2, requests=1))
        async with tree.used(side.pid) as used:
            traces = await side.run(job)
    finally:
        tree.pause(side.pid)
    tokens = sum(trace.num_tokens for trace in traces)
    assert tokens == job.streams * job.requests * job.tokens, f"{tokens} tokens came for {job}"
    return replace(
        summary(traces),
        server_cpu_s_per_1k=1000 * used.server_cpu_s / tokens,
        client_cpu_s_per_1k=1000 * used.client_cpu_s / tokens,
        others_cores=used.others_cpu_s / used.seconds,
        peak_rss_mb=used.peak_rss_mb,
    )


async def idle_cores(side: Side) -> float:
    """Cores that a side uses when nobody asks."""
    async with tree.used(side.pid) as used:
        await asyncio.sleep(IDLE_S)
    return round(used.server_cpu_s / used.seconds, 2)


def ratios(runs: Runs, streams: list[int]) -> dict[str, dict[str, list[float]]]:
    """[median, smallest, largest] over the rounds, by name and number of streams; without the sides not measured."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, (one, other, metric) in RATIOS.items():
        found[name] = {}
        for count in streams:
            pairs = zip(runs.get((*one, count), ()), runs.get((*other, count), ()), strict=False)
            values = [getattr(a, metric) / getattr(b, metric) for a, b in pairs if getattr(b, metric)]
            if values:
                found[name][str(count)] = spread(values)
    return found


def report(arguments: argparse.Namespace, runs: Runs, facts: dict[str, Any]) -> None:
    """The table, the file, and one line of JSON."""
    others = quantile([run.others_cores for found in runs.values() for run in found], 0.5)
    print(
        f"\n{arguments.model or 'tiny Qwen2'}, {arguments.dtype}, {arguments.tokens} tokens, n={arguments.rounds}, "
        f"{os.cpu_count()} cores of which others used {others:.2f}\n"
    )
    shown = ["tokens_per_s", "requests_per_s", "ttft_p50_ms", "tpot_ms", "itl_p50_ms", "itl_p99_ms", "e2e_p50_ms"]
    shown += ["server_cpu_s_per_1k", "peak_rss_mb"]
    print("| side | lane | streams | " + " | ".join(shown) + " |")
    print("|---" * (3 + len(shown)) + "|")
    rows: list[dict[str, Any]] = []
    for (side, lane, streams), found in runs.items():
        columns = spreads(found)
        rows.append({"side": side, "lane": lane, "streams": streams, **columns})
        cells = [f"{columns[name][0]:g} ({columns[name][1]:g}-{columns[name][2]:g})" for name in shown]
        print(f"| {side} | {lane} | {streams} | " + " | ".join(cells) + " |")
    found_ratios = ratios(runs, arguments.streams)
    result: dict[str, Any] = {name: {n: v[0] for n, v in by.items()} for name, by in found_ratios.items()}
    result |= {"model": arguments.model or "tiny", "dtype": arguments.dtype, "tokens": arguments.tokens}
    result |= {"rounds": arguments.rounds, "requests": arguments.requests, "pin": arguments.pin, "log": arguments.log}
    result |= {"others_cores": round(others, 2), "sides": facts}
    result["prompt_tokens"] = {row["side"]: row["prompt_tokens"][0] for row in rows}
    if arguments.out:
        each = [
            {"side": side, "lane": lane, "streams": streams, "rounds": [asdict(run) for run in found]}
            for (side, lane, streams), found in runs.items()
        ]
        everything = {**result, "ratios_median_min_max": found_ratios, "rows": rows, "runs": each}
        arguments.out.write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(result))


def _turned(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]


if __name__ == "__main__":
    main()
