"""The held-out tasks: `python -m examples.shop.held_out` writes `evaluation/tasks.jsonl` and its pictures.

Their values belong to the evaluation split, which neither the model's training nor the traffic ever
draws from. The files are committed; a test rebuilds them and compares.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from examples.shop.families import FAMILIES, Task, make_task

EVALUATION = Path(__file__).with_name("evaluation")
EACH = 44
"""Held-out tasks of every family."""


def held_out(each: int = EACH) -> tuple[Task, ...]:
    """`each` different evaluation tasks of every family, always the same ones."""
    tasks: list[Task] = []
    for family in FAMILIES:
        rng = random.Random(f"evaluation {family}")
        found: dict[tuple[str, bytes | None], Task] = {}
        while len(found) < each:
            task = make_task(family, "evaluation", rng)
            found.setdefault((task.prompt, task.picture), task)
        tasks.extend(found.values())
    return tuple(tasks)


def write(folder: Path) -> None:
    """Write the held-out tasks and their pictures to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, task in enumerate(held_out()):
        images = []
        if task.picture is not None:
            images = [f"{hashlib.sha256(task.picture).hexdigest()[:16]}.png"]
            (folder / images[0]).write_bytes(task.picture)
        rows.append(
            {
                "id": f"{task.family}-{number % EACH:02d}",
                "family": task.family,
                "prompt": task.prompt,
                "images": images,
                "answer": task.answer,
                "match": task.match,
            }
        )
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write(EVALUATION)
