"""A few examples of every stage, chosen so that each kind is seen; the same ones whenever the report is written."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from nightschool_server import chat
from nightschool_server.store.store import Store

from nightschool_learner import practice_records
from nightschool_learner.practice_records import CandidateRow, DecidedStep
from nightschool_learner.report.contents import (
    Action,
    Examples,
    PairExample,
    SeedExample,
    StepExample,
    TaskExample,
)
from nightschool_learner.seed_records import KEPT
from nightschool_learner.synthesis.records import FileOrigin, Verification, origins_of, verification_of
from nightschool_learner.turns import shown, turns_of, turns_of_json

OF_A_KIND = 2
"""Seeds by reason, dropped tasks by verdict, steps by who decided them."""
NUM_TASKS = 6
NUM_PAIRS = 6
PICKED_BY = ("critic", "facts", "fallback", "agreed")

T = TypeVar("T")


def examples_of(store: Store, cycle_id: str) -> Examples:
    """Examples of every stage that the cycle reached."""
    return Examples(
        seeds=_seeds(store, cycle_id),
        tasks=_tasks(store, cycle_id),
        dropped_tasks=_dropped_tasks(store, cycle_id),
        steps=_steps(store, cycle_id),
        pairs=_pairs(store, cycle_id),
    )


def seed_requests_of(store: Store, cycle_id: str) -> dict[str, tuple[str, ...]]:
    """The logged requests that each task was written from, by task id."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in store.query(
        "SELECT s.task_id, s.response_id FROM task_seeds s JOIN tasks t ON t.id = s.task_id WHERE t.cycle_id = ? "
        "ORDER BY s.response_id",
        (cycle_id,),
    ):
        found[row["task_id"]].append(row["response_id"])
    return {task_id: tuple(ids) for task_id, ids in found.items()}


def _seeds(store: Store, cycle_id: str) -> tuple[SeedExample, ...]:
    rows = store.query(
        "SELECT response_id, why FROM cycle_seeds WHERE cycle_id = ? ORDER BY position, response_id", (cycle_id,)
    )
    return tuple(
        SeedExample(row["response_id"], row["why"], _logged_turns(store, row["response_id"]), _said_of(store, row))
        for row in _some_of_each(rows, lambda row: row["why"])
    )


def _logged_turns(store: Store, response_id: str) -> Any:
    rows = store.query("SELECT role, parts FROM messages WHERE response_id = ? ORDER BY position", (response_id,))
    stored = [{"role": row["role"], "parts": json.loads(row["parts"])} for row in rows]
    return turns_of(chat.messages_from_json(chat.canonical_json(stored)))


def _said_of(store: Store, seed: Mapping[str, Any]) -> str:
    """What callers said of the answer, the latest of it."""
    row = store.one(
        "SELECT good, score, comment, correction FROM feedback WHERE response_id = ? ORDER BY created_at DESC LIMIT 1",
        (seed["response_id"],),
    )
    if row is None:
        return ""
    said = [] if row["good"] is None else ["thumb up" if row["good"] else "thumb down"]
    said += [] if row["score"] is None else [f"score {row['score']:g}"]
    said += [row["comment"]] if row["comment"] else []
    said += [f"should have been: {row['correction']}"] if row["correction"] else []
    return shown(", ".join(said))


def _tasks(store: Store, cycle_id: str) -> tuple[TaskExample, ...]:
    rows = store.query(
        "SELECT id, prompt, images, files FROM tasks WHERE cycle_id = ? AND state = ? ORDER BY slot", (cycle_id, KEPT)
    )
    requests = seed_requests_of(store, cycle_id)
    return tuple(
        TaskExample(
            row["id"],
            KEPT,
            shown(row["prompt"]),
            tuple(json.loads(row["images"])),
            tuple(file["name"] for file in json.loads(row["files"])),
            requests.get(row["id"], ()),
            origins=tuple(_origin(origin) for origin in origins_of(store, row["id"])),
            verification=_verification(store, row["id"]),
        )
        for row in _spread(rows, NUM_TASKS)
    )


def _origin(origin: FileOrigin) -> FileOrigin:
    return replace(origin, name=shown(origin.name), description=shown(origin.description), code=shown(origin.code))


def _verification(store: Store, task_id: str) -> Verification | None:
    said = verification_of(store, task_id)
    return said and replace(said, reason=shown(said.reason), original=shown(said.original))


def _dropped_tasks(store: Store, cycle_id: str) -> tuple[TaskExample, ...]:
    """What the writer wrote in vain, some of each kind."""
    tries = [
        TaskExample(row["id"], attempt["verdict"], shown(attempt["text"]), (), (), (), shown(attempt.get("reason", "")))
        for row in store.query("SELECT id, raw FROM tasks WHERE cycle_id = ? ORDER BY slot", (cycle_id,))
        for attempt in json.loads(row["raw"])
        if attempt["verdict"] != KEPT
    ]
    return tuple(sorted(_some_of_each(tries, lambda one: one.verdict), key=lambda one: one.verdict))


def _steps(store: Store, cycle_id: str) -> tuple[StepExample, ...]:
    found: list[StepExample] = []
    for picked_by in PICKED_BY:
        steps = practice_records.steps_picked_by(store, cycle_id, (picked_by,))
        richest = sorted(steps, key=lambda step: (-min(len(step.candidates), 3), step.step.simulated))
        found += [_step(store, step) for step in _spread(richest[: 10 * OF_A_KIND], OF_A_KIND)]
    return tuple(found)


def _step(store: Store, step: DecidedStep) -> StepExample:
    row = store.one("SELECT abstention FROM steps WHERE id = ?", (step.step.id,))
    actions = tuple(_action(one, is_picked=one.position == step.step.picked) for one in step.candidates)
    return StepExample(
        step.step.id,
        step.task_id,
        turns_of_json(step.step.history),
        actions,
        step.step.picked_by,
        row["abstention"] if row else "",
    )


def _pairs(store: Store, cycle_id: str) -> tuple[PairExample, ...]:
    rows = store.query(
        "SELECT p.*, s.history, r.task_id FROM pairs p JOIN steps s ON s.id = p.step_id "
        "JOIN rollouts r ON r.id = s.rollout_id WHERE p.cycle_id = ? ORDER BY p.kind, p.id",
        (cycle_id,),
    )
    requests = seed_requests_of(store, cycle_id)
    return tuple(_pair(store, row, requests.get(row["task_id"], ())) for row in _spread(rows, NUM_PAIRS))


def _pair(store: Store, row: Mapping[str, Any], requests: tuple[str, ...]) -> PairExample:
    sides = {one.id: one for one in practice_records.candidates_of(store, row["step_id"])}
    return PairExample(
        pair_id=row["id"],
        task_id=row["task_id"],
        kind=row["kind"],
        margin=row["margin"],
        history=turns_of_json(row["history"]),
        chosen=_action(sides[row["chosen"]], is_picked=True),
        rejected=_action(sides[row["rejected"]], is_picked=False),
        seed_requests=requests,
    )


def _action(one: CandidateRow, *, is_picked: bool) -> Action:
    return Action(shown(one.text), shown(one.observation), one.failure, one.num_samples, is_picked, one.images)


def _some_of_each(items: Sequence[T], kind: Callable[[T], Hashable]) -> list[T]:
    """The first `OF_A_KIND` of each kind, in their order."""
    seen: dict[Hashable, int] = defaultdict(int)
    kept = []
    for item in items:
        seen[kind(item)] += 1
        if seen[kind(item)] <= OF_A_KIND:
            kept.append(item)
    return kept


def _spread(items: Sequence[T], num: int) -> list[T]:
    """So many of them, evenly spread from the first on."""
    return [items[i * len(items) // num] for i in range(num)] if len(items) > num else list(items)
