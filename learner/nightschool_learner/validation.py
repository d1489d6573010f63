"""Validation of a training run: which rows are held back, and which look at them decides what is published.

A share of the pairs and of the anchors, whole tasks at a time, is never trained on. A look is the run's own objective
on them at one step (`trainer_watch.py` takes it). The weights of the best look are published; where no look is better
than the start, training did not help, and the cycle ends before it costs an evaluation. Pure functions, no torch.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nightschool_learner.manifest import Alarm, Look

MIN_HELD_BACK = 4
"""Of fewer pairs a look says nothing."""
MIN_PAIRS = 16
"""With fewer none are held back: training needs them more."""


def split_rows(
    pairs: Sequence[Mapping[str, Any]], anchors: Sequence[Mapping[str, Any]], share: float, seed: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Indices of the pairs and of the anchors to hold back: at least `share` of each, and never half a task.

    Rows of one task repeat each other: held back and trained on, they would show memory and not learning.
    """
    if not share or len(pairs) < MIN_PAIRS:
        return frozenset(), frozenset()
    rng = random.Random(seed)
    of_pairs, of_anchors = _by_task(pairs), _by_task(anchors)
    tasks = _drawn(of_pairs, of_pairs, max(MIN_HELD_BACK, round(share * len(pairs))), rng)
    with_tasks = [task for task in tasks if task in of_anchors]
    num_missing = round(share * len(anchors)) - sum(len(of_anchors[task]) for task in with_tasks)
    held_anchors = with_tasks + _drawn(of_anchors, of_anchors.keys() - of_pairs.keys(), num_missing, rng)
    return (
        frozenset(index for task in tasks for index in of_pairs[task]),
        frozenset(index for task in held_anchors for index in of_anchors[task]),
    )


def look_steps(num_steps: int, num_looks: int) -> frozenset[int]:
    """The steps after which to look, spread evenly, the last one included."""
    return frozenset(math.ceil(num_steps * (i + 1) / num_looks) for i in range(num_looks))


def best_look(looks: Sequence[Look], *, sound_only: bool = False) -> Look | None:
    """The look of least loss, the start included; `sound_only` leaves out those that raised an alarm."""
    kept = [look for look in looks if math.isfinite(look.loss) and not (sound_only and look.alarms and look.step)]
    return min(kept, key=lambda look: (look.loss, look.step), default=None)


def reason_to_stop(looks: Sequence[Look], patience: int, *, stops_on_alarm: bool) -> str:
    """Why training should end after these looks; empty where it should go on."""
    if not looks:
        return ""
    latest = looks[-1]
    if stops_on_alarm and latest.alarms and latest.step:
        return f"step {latest.step}: {latest.alarms[0].message}"
    best = best_look(looks)
    waited = sum(look.step > best.step for look in looks) if best is not None else len(looks)
    if not patience or waited < patience:
        return ""
    return f"step {latest.step}: no better look at the held-back rows for {waited} looks"


def no_gain(looks: Sequence[Look], *, sound_only: bool = False) -> Alarm | None:
    """The alarm of a run of which no look is better than its start; None where one is, or nobody looked."""
    best = best_look(looks, sound_only=sound_only)
    if not looks or (best is not None and best.step > 0):
        return None
    start, least = looks[0], best_look(looks[1:]) or looks[-1]
    return Alarm(
        name="validation",
        value=least.loss,
        limit=start.loss,
        message=f"the held-back loss is {least.loss:.4f} at best, after step {least.step}; it was {start.loss:.4f}",
    )


def _by_task(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    tasks: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        tasks[_task_of(row)].append(index)
    return tasks


def _task_of(row: Mapping[str, Any]) -> str:
    """What the conversation begins with, up to the user's first turn, and the pictures that it shows."""
    messages = row["prompt"]
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages) - 1)
    opening = messages[: first + 1]
    num_images = sum(
        part.get("type") == "image" for m in opening if not isinstance(m["content"], str) for part in m["content"]
    )
    return json.dumps([opening, row["images"][:num_images]], sort_keys=True)


def _drawn(
    by_task: Mapping[str, Sequence[int]], tasks: Collection[str], num_rows: int, rng: random.Random
) -> list[str]:
    """Some of `tasks` in random order, until they have `num_rows` rows."""
    order = sorted(tasks)
    rng.shuffle(order)
    drawn: list[str] = []
    while order and sum(len(by_task[task]) for task in drawn) < num_rows:
        drawn.append(order.pop())
    return drawn
