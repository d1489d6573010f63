"""The critic's gold set: `python -m examples.shop.gold_set` writes `gold/pairs.jsonl` and its pictures.

Each pair sets a step of the one right way through a task against a wrong one: the error that the dummy was taught, or a
slip. A rule decides, no person. Values belong to the traffic split, which the model's training never draws from. Steps
that a tool refuses are left out, since facts decide those. The files are committed; a test rebuilds them and compares.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from examples.shop.demonstrations import Step, right_steps, slip, taught_error
from examples.shop.families import FAMILIES, Task, make_task

GOLD = Path(__file__).with_name("gold")
EACH = 14
"""Pairs of every family."""
TAUGHT_SHARE = 0.6
"""Of the wrong steps where the family has a taught error."""


def gold_pairs(each: int = EACH) -> list[tuple[Task, dict[str, Any]]]:
    """`each` pairs of every family with their tasks, always the same ones."""
    pairs: list[tuple[Task, dict[str, Any]]] = []
    for family in FAMILIES:
        rng = random.Random(f"gold {family}")
        for number in range(each):
            task = make_task(family, "traffic", rng)
            pairs.append((task, _pair(task, f"{family}-{number:02d}", rng)))
    return pairs


def write(folder: Path) -> None:
    """Write the pairs and their pictures to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for task, row in gold_pairs():
        if task.picture is not None:
            row["images"] = [f"{hashlib.sha256(task.picture).hexdigest()[:16]}.png"]
            (folder / row["images"][0]).write_bytes(task.picture)
        rows.append(row)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pair(task: Task, name: str, rng: random.Random) -> dict[str, Any]:
    steps = right_steps(task)
    position = rng.randrange(len(steps))
    right, wrong = steps[position], _wrong(task, position, rng)
    better = rng.choice("ab")
    sides = {"a": right, "b": wrong} if better == "a" else {"a": wrong, "b": right}
    history: list[dict[str, str]] = []
    for step in steps[:position]:
        history += [{"role": "assistant", "text": step.action}, {"role": "tool", "text": step.observation}]
    row: dict[str, Any] = {"id": name, "task": task.prompt, "images": [], "history": history, "better": better}
    return row | {side: {"action": step.action, "observation": step.observation} for side, step in sides.items()}


def _wrong(task: Task, position: int, rng: random.Random) -> Step:
    error = taught_error(task, position)
    if error is not None and rng.random() < TAUGHT_SHARE:
        return error
    while (found := slip(task, position, rng)).observation.startswith("error"):
        pass
    return found


if __name__ == "__main__":
    write(GOLD)
