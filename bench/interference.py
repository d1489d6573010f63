"""What live requests wait while a whole learning cycle runs, against an idle learner, and what each guard contributes.

    python bench/interference.py [--rounds 5] [--ablation-rounds 1] [--ways as_shipped,no_nice,...] [--interval-ms 150]
        [--idle-s 8] [--quick] [--out FILE]

The shop on the transformers engine with its learner, and live clients in an open loop (`bench/live.py`): one streaming
request of 24 tokens every 150 ms in the mean. A round is a fresh server on a copy of the same home, an idle stretch, a
cycle from seeds to the gate (which rejects: every cycle starts from the base model), and an idle stretch; clients ask
all the while. Requests of the cycle are those sent between its start and its end. A ratio is of one round, cycle to
both idle stretches together. The clients are on the same machine: what they wait for the processor is in the figures.

Ways, by turns within a round: `as_shipped`; `no_nice` (learner and trainer at niceness 0); `no_priority` (practice is
sent as LIVE); `no_backoff` (practice takes whole steps as soon as no live request runs); `unguarded` (none of the
three).

Prints a table by way and stage and a last line of JSON: `ttft_p99_ratio` and `itl_p99_ratio` of `as_shipped`, median
over the rounds, their spread, the ratio of all rounds' requests together, and the same by stage and by way.
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
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from nightschool import AsyncClient, Cycle
from nightschool_server.config.serving import EngineConfig

from bench.live import Clients, Live, make_home, shop
from bench.load import gaps_ms, quantile, spread

AS_SHIPPED = tuple(
    f"engine.{name}={getattr(EngineConfig(), name)}" for name in ("max_practice_rows_with_live", "live_linger_ms")
)
"""The shop's own settings favour a short night."""
NO_NICE = ("learner.nice=0", "learner.train.nice=0")
NO_PRIORITY = ("learner.fault_injection.allow=true", "learner.fault_injection.practice_as_live=true")
NO_BACKOFF = ("engine.live_linger_ms=0",)
WAYS: dict[str, tuple[str, ...]] = {
    "as_shipped": (),
    "no_nice": NO_NICE,
    "no_priority": NO_PRIORITY,
    "no_backoff": NO_BACKOFF,
    "unguarded": NO_NICE + NO_PRIORITY + NO_BACKOFF,
}
SMALL = (
    "synthesize.num_tasks=80",
    "pairs.min_pairs=4",
    "train.epochs=2",
    "evaluate.max_tasks=100",
    "gate.min_n=100000",
)
"""A cycle of less than a minute, which promotes nothing."""
STAGES = ("synthesize", "explore", "train", "evaluate")
"""Those that last; critique is part of explore."""
NUM_SEEDS = 80
POLL_S = 0.5
TIME_LIMIT_S = 600.0


@dataclass
class Round:
    """One server's life: idle, cycle, idle."""

    idle: list[Live] = field(default_factory=list)
    cycle: list[Live] = field(default_factory=list)
    by_stage: dict[str, list[Live]] = field(default_factory=dict)
    stage_s: dict[str, float] = field(default_factory=dict)
    cycle_s: float = 0.0
    messages: dict[str, str] = field(default_factory=dict)
    """The last line of progress of each stage."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ablation-rounds", type=int, default=1, help="rounds in which the other ways are tried, too")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--interval-ms", type=float, default=150.0)
    parser.add_argument("--idle-s", type=float, default=8.0, help="before and after each cycle")
    parser.add_argument("--quick", action="store_true", help="one round, as shipped, short idle stretches")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every server")
    parser.add_argument("--out", type=Path, help="file for the result with every wait, JSON")
    arguments = parser.parse_args()
    arguments.ways = arguments.ways.split(",")
    if unknown := set(arguments.ways) - set(WAYS):
        parser.error(f"--ways has {', '.join(sorted(unknown))}: it takes {', '.join(WAYS)}")
    if arguments.quick:
        arguments.rounds, arguments.ways, arguments.idle_s = 1, ["as_shipped"], 5.0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-interference-") as folder:
        report(arguments, asyncio.run(measure(arguments, Path(folder))))


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[Round]]:
    """Every way's rounds."""
    await make_home(folder / "seeded", NUM_SEEDS)
    found: dict[str, list[Round]] = {way: [] for way in arguments.ways}
    for number in range(arguments.rounds):
        for way in arguments.ways:
            if way != arguments.ways[0] and number >= arguments.ablation_rounds:
                continue
            home = folder / f"{way}-{number}"
            shutil.copytree(folder / "seeded", home)
            found[way].append(await one_round(arguments, home, [*AS_SHIPPED, *WAYS[way], *arguments.set], number))
            shutil.rmtree(home)
            print(f"round {number + 1}, {way}: {_line(found[way][-1])}", flush=True)
    return found


async def one_round(arguments: argparse.Namespace, home: Path, settings: Sequence[str], number: int) -> Round:
    """Idle, cycle, idle. Raises RuntimeError for a cycle that did not come to its gate."""
    async with shop(home, list(settings)) as client:
        clients = Clients(client, arguments.interval_ms / 1000, number)
        await _until_learner(client)
        clients.begin()
        await asyncio.sleep(arguments.idle_s)
        cycle = await _cycle(client)
        await asyncio.sleep(arguments.idle_s)
        return _sorted_by_stage(await clients.end(), cycle)


async def _until_learner(client: AsyncClient) -> None:
    while not (await client.admin.status()).learner.running:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)


async def _cycle(client: AsyncClient) -> Cycle:
    cycle = await client.admin.cycles.trigger(reason="interference", overrides=SMALL)
    async with asyncio.timeout(TIME_LIMIT_S):
        while not cycle.state.ended:
            await asyncio.sleep(POLL_S)
            cycle = await client.admin.cycles.get(cycle.id)
    if cycle.evaluation is None:
        raise RuntimeError(f"the cycle ended as {cycle.state}: {cycle.outcome}")
    return cycle


def _sorted_by_stage(answered: list[Live], cycle: Cycle) -> Round:
    began, ended = _stamp(cycle.started_at), _stamp(cycle.ended_at)
    found = Round(cycle_s=ended - began)
    for live in answered:
        if began <= live.sent_at < ended:
            found.cycle.append(live)
        elif live.sent_at + live.trace.ended - live.trace.began < began or live.sent_at > ended:
            found.idle.append(live)
    for stage in cycle.stages:
        if stage.name in STAGES:
            first, last = _stamp(stage.started_at), _stamp(stage.ended_at)
            found.stage_s[stage.name] = last - first
            found.by_stage[stage.name] = [live for live in found.cycle if first <= live.sent_at < last]
            found.messages[stage.name] = stage.message
    return found


def _stamp(moment: datetime | None) -> float:
    assert moment is not None
    return moment.timestamp()


Waits = dict[str, float]


def waits(answered: Sequence[Live]) -> Waits:
    """Percentiles, milliseconds."""
    ttft, gaps = [live.ttft_ms for live in answered], gaps_ms(live.trace for live in answered)
    return {
        "ttft_p50_ms": quantile(ttft, 0.5),
        "ttft_p99_ms": quantile(ttft, 0.99),
        "itl_p50_ms": quantile(gaps, 0.5),
        "itl_p99_ms": quantile(gaps, 0.99),
    }


def ratio(rounds: Sequence[Round], metric: str, stage: str = "") -> dict[str, Any]:
    """Cycle (or one stage of it) to idle: of each round, and of all rounds' requests together."""
    each = [waits(_busy(one, stage))[metric] / waits(one.idle)[metric] for one in rounds if _busy(one, stage)]
    busy = [live for one in rounds for live in _busy(one, stage)]
    idle = [live for one in rounds for live in one.idle]
    pooled = waits(busy)[metric] / waits(idle)[metric]
    return {"median": spread(each)[0], "min_max": spread(each)[1:], "pooled": round(pooled, 3), "n": len(each)}


def _busy(one: Round, stage: str) -> list[Live]:
    return one.by_stage[stage] if stage else one.cycle


def _line(one: Round) -> str:
    found = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in one.stage_s.items())
    ttft, gaps = ratio([one], "ttft_p99_ms")["pooled"], ratio([one], "itl_p99_ms")["pooled"]
    return f"TTFT p99 x {ttft:.2f}, ITL p99 x {gaps:.2f}, cycle {one.cycle_s:.0f} s ({found})"


def report(arguments: argparse.Namespace, found: dict[str, list[Round]]) -> None:
    """The tables, the file, and one line of JSON."""
    print(
        f"\none request every {arguments.interval_ms:g} ms, {os.cpu_count()} cores; all rounds of a way together; ms\n"
    )
    heads = ["way", "while", "n", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "TTFT p99 ratio", "ITL p99 ratio"]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    by_way: dict[str, Any] = {}
    for way, rounds in ((way, rounds) for way, rounds in found.items() if rounds):
        idle = [live for one in rounds for live in one.idle]
        _row(way, "idle", idle, "")
        stages = {}
        for stage in ("", *STAGES):
            ratios = {f"{kind}_p99_ratio": ratio(rounds, f"{kind}_p99_ms", stage) for kind in ("ttft", "itl")}
            busy = [live for one in rounds for live in _busy(one, stage)]
            shown = " | ".join(f"{r['median']:g} ({r['min_max'][0]:g}-{r['min_max'][1]:g})" for r in ratios.values())
            _row(way, stage or "cycle", busy, shown)
            stages[stage or "cycle"] = {"n": len(busy), **_rounded(waits(busy)), **ratios}
        seconds = {stage: spread([one.stage_s[stage] for one in rounds]) for stage in STAGES}
        by_way[way] = {
            "rounds": len(rounds),
            "idle": {"n": len(idle), **_rounded(waits(idle))},
            **stages,
            "cycle_s": spread([one.cycle_s for one in rounds]),
            "stage_s": seconds,
        }
    first = by_way[arguments.ways[0]]["cycle"]
    result = {
        "ttft_p99_ratio": first["ttft_p99_ratio"]["median"],
        "itl_p99_ratio": first["itl_p99_ratio"]["median"],
        "way": arguments.ways[0],
        "interval_ms": arguments.interval_ms,
        "by_way": by_way,
    }
    if arguments.out:
        each = {way: [_told(one) for one in rounds] for way, rounds in found.items()}
        arguments.out.write_text(json.dumps({**result, "rounds": each}) + "\n")
    print(json.dumps(result))


def _row(way: str, when: str, answered: Sequence[Live], ratios: str) -> None:
    cells = [f"{value:.1f}" for value in waits(answered).values()]
    print(f"| {way} | {when} | {len(answered)} | " + " | ".join(cells) + f" | {ratios or '1 | 1'} |")


def _told(one: Round) -> dict[str, list[list[float]]]:
    """[Unix time, time to the first token in ms] of every request, by what ran."""
    parts = {"idle": one.idle, **one.by_stage}
    return {name: [[live.sent_at, round(live.ttft_ms, 2)] for live in found] for name, found in parts.items()}


def _rounded(found: Waits) -> Waits:
    return {name: round(value, 2) for name, value in found.items()}


if __name__ == "__main__":
    main()
