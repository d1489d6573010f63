"""What a live request waits while the learner explores: time to first token and to the whole answer.

    python -m bench.priority [--rounds 5] [--requests 20] [--load 64]

One real server on the shop model, over gRPC. Live requests come one after another, three ways, by turns: alone; beside
`--load` streams of PRACTICE priority, as a learner sends them; and beside as many streams of live callers. Prints
median and 95th percentile of each way, the ratio to "alone" (median, min-max over the rounds) and a last line of
JSON.
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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain

from nightschool import AsyncClient, Priority

from examples.shop.night.server import serving

WAYS: dict[str, Priority | None] = {"alone": None, "beside practice": Priority.PRACTICE, "beside live": Priority.LIVE}
TOKENS = 24
LOAD_TOKENS = 48


@dataclass
class Waits:
    """Milliseconds of one way's live requests."""

    first: list[list[float]] = field(default_factory=list)
    """To the first token, by round."""
    whole: list[list[float]] = field(default_factory=list)
    """To the end of the answer, by round."""


async def measure(rounds: int, num_requests: int, load: int) -> dict[str, Waits]:
    """Every way in every round, after one round that does not count."""
    found = {way: Waits() for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        async with serving(home, ["learner.enabled=false"]), AsyncClient(home=home) as client:
            for number in range(rounds + 1):
                for way, priority in WAYS.items():
                    async with loaded(client, load if priority else 0, priority):
                        first, whole = await live_requests(client, num_requests)
                    if number:
                        found[way].first.append(first)
                        found[way].whole.append(whole)
                print(f"round {number} of {rounds}", flush=True)
    return found


@asynccontextmanager
async def loaded(client: AsyncClient, num_streams: int, priority: Priority | None) -> AsyncIterator[None]:
    """That many streams that never end, all of them under way."""
    going = [asyncio.Event() for _ in range(num_streams)]

    async def ask_on(number: int) -> None:
        while True:
            prompt = f"Task {number}: how many red apples are there in the shop, and what do {number + 3} cost?"
            options = {"max_tokens": LOAD_TOKENS, "temperature": 1.2, "ignore_eos": True, "learning": "no_log"}
            async for _ in client.stream(prompt, priority=priority, **options):  # type: ignore[arg-type]
                going[number].set()

    streams = [asyncio.create_task(ask_on(number)) for number in range(num_streams)]
    try:
        # Practice streams wait for slots; enough of them run once a few have spoken.
        await asyncio.gather(*(event.wait() for event in going[: min(8, num_streams)]))
        yield
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def live_requests(client: AsyncClient, num_requests: int) -> tuple[list[float], list[float]]:
    """One after another. Returns milliseconds to the first token and to the whole of each."""
    first, whole = [], []
    for number in range(num_requests):
        begun, spoke = time.perf_counter(), 0.0
        prompt = f"Add {number + 10} and {number + 20} for Anna."
        async for _ in client.stream(
            prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True, learning="no_log", timeout_s=120
        ):
            spoke = spoke or time.perf_counter()
        whole.append(1000 * (time.perf_counter() - begun))
        first.append(1000 * (spoke - begun))
    return first, whole


def report(found: dict[str, Waits]) -> None:
    """The table, and the same as JSON."""
    print(f"{'':<18}{'first token, ms':>24}{'whole answer, ms':>24}{'whole / alone':>24}")
    print(f"{'':<18}{'median    95%':>24}{'median    95%':>24}{'median  min-max':>24}")
    numbers = {}
    for way, waits in found.items():
        first, whole = (sorted(chain.from_iterable(kind)) for kind in (waits.first, waits.whole))
        ratios = [
            statistics.median(mine) / statistics.median(alone)
            for mine, alone in zip(waits.whole, found["alone"].whole, strict=True)
        ]
        ratio = statistics.median(ratios)
        print(
            f"{way:<18}{statistics.median(first):>15.1f}{first[int(0.95 * len(first))]:>9.1f}"
            f"{statistics.median(whole):>15.1f}{whole[int(0.95 * len(whole))]:>9.1f}"
            f"{ratio:>12.2f}  {min(ratios):.2f}-{max(ratios):.2f}"
        )
        numbers[way] = {
            "n": len(whole),
            "first_ms": round(statistics.median(first), 1),
            "whole_ms": round(statistics.median(whole), 1),
            "whole_p95_ms": round(whole[int(0.95 * len(whole))], 1),
            "ratio_to_alone": round(ratio, 2),
            "ratio_min_max": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    print(json.dumps(numbers))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20, help="live requests of each way in each round")
    parser.add_argument("--load", type=int, default=64, help="streams beside them")
    arguments = parser.parse_args()
    report(asyncio.run(measure(arguments.rounds, arguments.requests, arguments.load)))


if __name__ == "__main__":
    main()
