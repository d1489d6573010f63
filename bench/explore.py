"""What practice takes, what comes of it, and how busy it keeps the engine: a cycle of the shop up to its pairs, by way.

    python bench/explore.py [--rounds 2] [--ways all,after_2,after_3] [--tasks 350] [--seeds 120] [--quick]
        [--out FILE]

A round of a way is a fresh server on a copy of the same home (the base model serves, no live requests) and one cycle
that stops after its pairs, all with the same seed of randomness. Ways: `all` (the shop's own settings), `after_2` and
`after_3` (`learner.explore.adaptive_after`), `rollouts_8` and `rollouts_64` (`learner.explore.concurrency`).

`busy` is the engine's own clock over the wall time of practice, `asked` the time with a call in flight. `again` is the
share of steps (by task and position) that the second round of a way has with the same candidates to the token.

Prints a row a round and a last line of JSON.
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
import sqlite3
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

from nightschool import AsyncClient

from bench.live import make_home, shop
from bench.load import spread

WAYS: dict[str, tuple[str, ...]] = {
    "all": (),
    "after_2": ("explore.adaptive_after=2",),
    "after_3": ("explore.adaptive_after=3",),
    "rollouts_8": ("explore.concurrency=8",),
    "rollouts_64": ("explore.concurrency=64",),
}
TO_THE_PAIRS = ("seed=11", "pairs.min_pairs=1000000")
"""No cycle has so many: it stops there."""
POLL_S = 0.5
TIME_LIMIT_S = 900.0

Steps = dict[tuple[str, int], str]
"""Candidates by task and position of the step."""


@dataclass(frozen=True)
class Numbers:
    """One cycle."""

    tasks: int
    steps: int
    samples: int
    tokens: int
    pairs: int
    decided: int
    """Steps that facts or the critic decided."""
    choice_share: float
    wall_s: float
    busy: float
    asked: float
    critic_tokens_per_pair: float
    critic_s_per_pair: float
    load: float
    """Of the machine at the start, over the last minute."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="all,after_2,after_3")
    parser.add_argument("--tasks", type=int, default=350)
    parser.add_argument("--seeds", type=int, default=120, help="logged requests that the cycle learns from")
    parser.add_argument("--quick", action="store_true", help="one round of 40 tasks, as the shop has it")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    arguments = parser.parse_args()
    arguments.ways = arguments.ways.split(",")
    if unknown := set(arguments.ways) - set(WAYS):
        parser.error(f"--ways has {', '.join(sorted(unknown))}: it takes {', '.join(WAYS)}")
    if arguments.quick:
        arguments.rounds, arguments.ways, arguments.tasks, arguments.seeds = 1, ["all"], 40, 40
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-explore-") as folder:
        report(arguments, asyncio.run(measure(arguments, Path(folder))))


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[tuple[Numbers, Steps]]]:
    """Every way's rounds, the ways by turns."""
    await make_home(folder / "seeded", arguments.seeds)
    found: dict[str, list[tuple[Numbers, Steps]]] = {way: [] for way in arguments.ways}
    print("| way | " + " | ".join(Numbers.__dataclass_fields__) + " |", flush=True)
    for number in range(arguments.rounds):
        for way in arguments.ways:
            home = folder / f"{way}-{number}"
            shutil.copytree(folder / "seeded", home)
            found[way].append(await one_round(home, [f"synthesize.num_tasks={arguments.tasks}", *WAYS[way]]))
            shutil.rmtree(home)
            cells = (f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in _values(found[way][-1][0]))
            print(f"| {way} | " + " | ".join(cells) + " |", flush=True)
    return found


async def one_round(home: Path, settings: list[str]) -> tuple[Numbers, Steps]:
    """A server's life with one cycle. Raises RuntimeError for a cycle that did not come to its pairs."""
    load = os.getloadavg()[0]
    async with shop(home, []) as client:
        told = json.loads(await _cycle(client, settings))
    with sqlite3.connect(home / "nightschool.db") as db:
        tokens = int(db.execute("SELECT SUM(num_tokens) FROM steps").fetchone()[0])
        steps = _steps(db)
    practice, critic, funnel = told["practice"], told["critic"], told["funnel"]
    if not funnel["pairs"] or practice["engine_busy_share"] is None:
        raise RuntimeError(f"the cycle ended as {told['cycle']['state']}: {told['cycle']['outcome']}")
    numbers = Numbers(
        tasks=funnel["tasks_kept"],
        steps=funnel["steps"],
        samples=practice["num_samples"],
        tokens=tokens,
        pairs=funnel["pairs"],
        decided=funnel["steps_decided"],
        choice_share=practice["coverage"]["choice_share"],
        wall_s=practice["wall_s"],
        busy=practice["engine_busy_share"],
        asked=practice["asking_share"],
        critic_tokens_per_pair=critic["tokens_per_pair"],
        critic_s_per_pair=critic["seconds_per_pair"],
        load=load,
    )
    return numbers, steps


async def _cycle(client: AsyncClient, settings: list[str]) -> bytes:
    """The report of a cycle."""
    cycle = await client.admin.cycles.trigger(reason="exploration", overrides=[*TO_THE_PAIRS, *settings])
    async with asyncio.timeout(TIME_LIMIT_S):
        while not cycle.state.ended:
            await asyncio.sleep(POLL_S)
            cycle = await client.admin.cycles.get(cycle.id)
    return await client.admin.cycles.report(cycle.id, format="json")


def _steps(db: sqlite3.Connection) -> Steps:
    rows = db.execute(
        "SELECT t.prompt, s.position, json_group_array(json_array(c.token_ids, c.num_samples)) FROM candidates c "
        "JOIN steps s ON s.id = c.step_id JOIN rollouts r ON r.id = s.rollout_id JOIN tasks t ON t.id = r.task_id "
        "GROUP BY s.id"
    )
    return {(prompt, position): candidates for prompt, position, candidates in rows}


def again(rounds: list[Steps]) -> float | None:
    """Of the first round's steps, the share that the second one has alike."""
    if len(rounds) < 2:
        return None
    first, second = rounds[:2]
    return sum(second.get(key) == candidates for key, candidates in first.items()) / len(first)


def report(arguments: argparse.Namespace, found: dict[str, list[tuple[Numbers, Steps]]]) -> None:
    """The file, and one line of JSON."""
    by_way: dict[str, Any] = {}
    for way, rounds in found.items():
        columns = zip(*(_values(numbers) for numbers, _ in rounds), strict=True)
        by_way[way] = dict(zip(Numbers.__dataclass_fields__, map(spread, map(list, columns)), strict=True))
        by_way[way] |= {"rounds": len(rounds), "again": again([steps for _, steps in rounds])}
    result = {"tasks": arguments.tasks, "cores": os.cpu_count(), "by_way": by_way}
    if arguments.out:
        each = {way: [asdict(numbers) for numbers, _ in rounds] for way, rounds in found.items()}
        arguments.out.write_text(json.dumps({**result, "rounds": each}) + "\n")
    print(json.dumps(result))


def _values(numbers: Numbers) -> list[Any]:
    return list(asdict(numbers).values())


if __name__ == "__main__":
    main()
