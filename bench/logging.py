"""What logging requests costs the serving path: the same streams with a log that may be learned from, and with none.

    python bench/logging.py [--engine vllm|transformers] [--streams 32] [--rounds 30] [--requests 2] [--tokens 64]
        [--model DIR] [--dtype bfloat16] [--quick]

One server. A round is two short blocks of the same load, one with the learning policy TRAIN, whose requests are
written with their answers, and one with NO_LOG, of which a row of counts is kept and no text; which comes first
alternates. Many short rounds tell more than few long ones where others use the machine, too. A block ends with its last
answer; before the next one begins the log's queue is empty, so that no block pays for another's rows. `drain_s` is what
was waited for that: were it long, the writing would lag behind and a block would not show its cost.

`tok_s_cost` is the share of tokens per second that logging takes, 1 - logged / not logged of one round: the median
over the rounds, negative where none is seen. Prints a table and a last line of JSON, with [median, smallest, largest],
the quartiles, and a 95% interval of the median (bootstrap over the rounds).
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
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass

from bench import tree
from bench.load import Job, Trace, quantile, spread, summary
from bench.sides import MAX_STREAMS, Nightschool, Setting

DRAIN_S = 60.0
DRAIN_POLL_S = 0.02
NUM_RESAMPLES = 5000


@dataclass(frozen=True)
class Block:
    """One block of load."""

    tokens_per_s: float
    ttft_p50_ms: float
    cpu_s_per_1k: float
    """Of the server's processes, per 1,000 tokens."""
    others_cores: float
    drain_s: float
    """From the last answer until every row was written."""


Rounds = dict[bool, list[Block]]
"""By whether requests were logged, one of each round."""


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-logging-") as folder:
        from bench.tiny import make_adapter, make_model

        model = arguments.model or str(make_model(Path(folder) / "model"))
        setting = Setting(model, make_adapter(model, Path(folder) / "first", 0), arguments.dtype, False, True)
        rounds = asyncio.run(measure(arguments, setting))
    report(arguments, rounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--streams", type=int, default=MAX_STREAMS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--requests", type=int, default=2, help="of each stream in a block")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", default="", help="a model folder (default: a tiny one made on the spot)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quick", action="store_true", help="6 rounds")
    found = parser.parse_args()
    if found.quick:
        found.rounds = 6
    return found


async def measure(arguments: argparse.Namespace, setting: Setting) -> Rounds:
    """Every round, after two that do not count."""
    rounds: Rounds = {True: [], False: []}
    server = Nightschool(setting, arguments.engine)
    try:
        await server.start()
        print(f"started in {server.startup_s:.1f} s", flush=True)
        for number in range(arguments.rounds + 2):
            for is_logged in (number % 2 == 0, number % 2 == 1):
                key = f"{number:03d}-{'train' if is_logged else 'no_log'}"
                job = Job(key, arguments.streams, arguments.tokens, arguments.requests)
                rounds[is_logged].append(await block(server, job, is_logged))
        return {is_logged: found[2:] for is_logged, found in rounds.items()}
    finally:
        await server.close()


async def block(server: Nightschool, job: Job, is_logged: bool) -> Block:
    """One block, and the wait until its rows are written. Raises AssertionError where a row is missing."""
    server.with_log = is_logged
    before = (await server.client.admin.status()).log
    async with tree.used(server.pid) as used:
        traces = await server.run(job)
    drain_s = await _drained(server, before.num_requests + len(traces))
    numbers = summary(traces)
    return Block(
        tokens_per_s=numbers.tokens_per_s,
        ttft_p50_ms=numbers.ttft_p50_ms,
        cpu_s_per_1k=1000 * used.server_cpu_s / _num_tokens(traces, job),
        others_cores=used.others_cpu_s / used.seconds,
        drain_s=drain_s,
    )


async def _drained(server: Nightschool, num_requests: int) -> float:
    began = time.perf_counter()
    while True:
        log = (await server.client.admin.status()).log
        waited = time.perf_counter() - began
        if log.num_requests == num_requests and not log.queue_length:
            return waited
        assert not log.num_dropped, f"{log.num_dropped} lines of the log were dropped"
        assert waited < DRAIN_S, f"{log.num_requests} requests are logged instead of {num_requests}"
        await asyncio.sleep(DRAIN_POLL_S)


def _num_tokens(traces: list[Trace], job: Job) -> int:
    num_tokens = sum(trace.num_tokens for trace in traces)
    assert num_tokens == job.streams * job.requests * job.tokens, f"{num_tokens} tokens came for {job}"
    return num_tokens


def median_interval(values: list[float]) -> list[float]:
    """A 95% interval of the median, bootstrapped."""
    rng = random.Random(0)
    medians = [statistics.median(rng.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES)]
    return [round(quantile(medians, q), 4) for q in (0.025, 0.975)]


def report(arguments: argparse.Namespace, rounds: Rounds) -> None:
    """The table, then one line of JSON."""
    columns = {"tok/s": "tokens_per_s", "TTFT p50, ms": "ttft_p50_ms", "server CPU s per 1,000 tok": "cpu_s_per_1k"}
    print(f"\n{arguments.engine}, {arguments.streams} streams, n={arguments.rounds}, {os.cpu_count()} cores\n")
    print("| requests | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    spreads = {
        is_logged: {name: spread([getattr(one, name) for one in found]) for name in columns.values()}
        for is_logged, found in rounds.items()
    }
    for is_logged, found in spreads.items():
        cells = [f"{middle:g} ({low:g}-{high:g})" for middle, low, high in found.values()]
        print(f"| {'logged' if is_logged else 'not logged'} | " + " | ".join(cells) + " |")
    pairs = list(zip(rounds[True], rounds[False], strict=True))
    costs = [1 - logged.tokens_per_s / plain.tokens_per_s for logged, plain in pairs]
    cpu = [logged.cpu_s_per_1k / plain.cpu_s_per_1k - 1 for logged, plain in pairs]
    result = {
        "tok_s_cost": round(statistics.median(costs), 4),
        "tok_s_cost_spread": spread(costs),
        "tok_s_cost_quartiles": [round(quantile(costs, q), 4) for q in (0.25, 0.75)],
        "tok_s_cost_interval": median_interval(costs),
        "cpu_cost": round(statistics.median(cpu), 4),
        "cpu_cost_interval": median_interval(cpu),
        "drain_s": spread([one.drain_s for one in rounds[True]]),
        "others_cores": round(statistics.median(one.others_cores for found in rounds.values() for one in found), 2),
        "engine": arguments.engine,
        "rounds": arguments.rounds,
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "requests": arguments.requests,
        "logged": spreads[True],
        "not_logged": spreads[False],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
