"""The rows of practice: rollouts, steps, candidates and pairs.

Owns their SQL; critiques and duels are `comparisons.py`'s. What writes takes a connection inside a transaction, see
`writer.py`. A step is written when its candidates have run, its comparisons one by one as they are paid for, its pick
last; so a killed learner finds exactly what it still has to do.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightschool_server.chat import canonical_json
from nightschool_server.store.store import Store

from nightschool_learner.comparisons import Duels, duel_of
from nightschool_learner.critique import Choice

REFUSED = "refused"
"""Failure of a candidate that calls a tool which practice may not run: no fact against it, but no way on."""
BUDGET = "budget"
"""How a rollout ends whose next step the cycle's budget does not allow."""


@dataclass(frozen=True)
class CandidateRow:
    """A row of `candidates`: one distinct action of a step."""

    id: str
    step_id: str
    position: int
    text: str
    """Verbatim as sampled; of the first of the samples that said it."""
    token_ids: tuple[int, ...]
    logprob: float
    """Sum over its tokens, of the untempered distribution."""
    num_samples: int
    observation: str
    failure: str
    """Empty, or which fact speaks against it: parse, schema, execution, budget."""
    final: bool
    simulated: bool = False
    """Whether a simulator gave a part of the observation."""
    images: tuple[str, ...] = ()
    """sha256 of the images in the observation, in order."""


@dataclass(frozen=True)
class StepRow:
    """A row of `steps`."""

    id: str
    rollout_id: str
    position: int
    history: str
    """The conversation that the candidates continue, as messages JSON."""
    picked: int | None
    picked_by: str
    simulated: bool = False
    """Whether a simulator gave an observation of the history."""
    num_tokens: int = 0
    """Of all its samples, those that asked for the same action included."""
    num_calls: int = 0
    """Tool calls that its candidates asked for."""


@dataclass(frozen=True)
class DecidedStep:
    """A step with its candidates and every duel of them."""

    step: StepRow
    task_id: str
    candidates: tuple[CandidateRow, ...]
    duels: Duels
    """By (lower, higher) position."""

    @property
    def simulated(self) -> bool:
        """Whether a simulator gave an observation of its history or of one of its candidates."""
        return self.step.simulated or any(candidate.simulated for candidate in self.candidates)


@dataclass(frozen=True)
class RolloutRow:
    """A row of `rollouts`."""

    id: str
    task_id: str
    state: str


def rollouts_of(store: Store, cycle_id: str) -> dict[str, RolloutRow]:
    """The cycle's rollouts by task id."""
    rows = store.query("SELECT id, task_id, state FROM rollouts WHERE cycle_id = ?", (cycle_id,))
    return {row["task_id"]: RolloutRow(row["id"], row["task_id"], row["state"]) for row in rows}


def start_rollout(db: sqlite3.Connection, cycle_id: str, row: RolloutRow, adapter: str) -> None:
    """Begin the one rollout of a task."""
    db.execute(
        "INSERT INTO rollouts (id, cycle_id, task_id, adapter, state, started_at) VALUES (?, ?, ?, ?, 'running', ?)",
        (row.id, cycle_id, row.task_id, adapter, time.time()),
    )


def end_rollout(db: sqlite3.Connection, rollout_id: str, state: str, outcome: str, answer: str) -> None:
    """Write how a rollout ended."""
    db.execute(
        "UPDATE rollouts SET state = ?, outcome = ?, answer = ?, ended_at = ? WHERE id = ?",
        (state, outcome, answer, time.time(), rollout_id),
    )


def steps_of(store: Store, rollout_id: str) -> list[StepRow]:
    """A rollout's steps in order."""
    rows = store.query(
        "SELECT * FROM steps WHERE rollout_id = ? ORDER BY position",
        (rollout_id,),
    )
    return [_step(row) for row in rows]


def insert_step(db: sqlite3.Connection, step: StepRow, candidates: Sequence[CandidateRow]) -> None:
    """Write a step whose candidates have run and among which nobody has chosen yet."""
    db.execute(
        "INSERT INTO steps (id, rollout_id, position, history, simulated, num_tokens, num_calls, created_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            step.id, step.rollout_id, step.position, step.history, int(step.simulated), step.num_tokens,
            step.num_calls, time.time(),
        ),
    )  # fmt: skip
    db.executemany(
        "INSERT INTO candidates (id, step_id, position, text, token_ids, logprob, num_samples, observation, "
        "failure, final, simulated, images) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                c.id, step.id, c.position, c.text, canonical_json(list(c.token_ids)), c.logprob, c.num_samples,
                c.observation, c.failure, int(c.final), int(c.simulated), canonical_json(list(c.images)),
            )
            for c in candidates
        ],
    )  # fmt: skip


def pick(db: sqlite3.Connection, step_id: str, choice: Choice) -> None:
    """Write a step's choice."""
    db.execute(
        "UPDATE steps SET picked = ?, picked_by = ?, abstention = ? WHERE id = ?",
        (choice.picked, choice.picked_by, choice.abstention, step_id),
    )


def candidates_of(store: Store, step_id: str) -> list[CandidateRow]:
    """A step's candidates in order."""
    rows = store.query("SELECT * FROM candidates WHERE step_id = ? ORDER BY position", (step_id,))
    return [_candidate(row) for row in rows]


def decided_steps(store: Store, cycle_id: str) -> list[DecidedStep]:
    """Every step of the cycle that facts or the critic decided."""
    return steps_picked_by(store, cycle_id, ("facts", "critic"))


def steps_picked_by(store: Store, cycle_id: str, picked_by: Sequence[str]) -> list[DecidedStep]:
    """The cycle's steps of these kinds with their candidates and duels, in the order of slot and step."""
    chosen = canonical_json(list(picked_by))
    of_cycle = (
        "FROM steps s JOIN rollouts r ON r.id = s.rollout_id JOIN tasks t ON t.id = r.task_id "
        "WHERE r.cycle_id = ? AND s.picked_by IN (SELECT value FROM json_each(?))"
    )
    candidates: dict[str, list[CandidateRow]] = defaultdict(list)
    rows = store.query(
        f"SELECT * FROM candidates WHERE step_id IN (SELECT s.id {of_cycle}) ORDER BY position", (cycle_id, chosen)
    )
    for row in rows:
        candidates[row["step_id"]].append(_candidate(row))
    duels: dict[str, Duels] = defaultdict(dict)
    for row in store.query(f"SELECT * FROM duels WHERE step_id IN (SELECT s.id {of_cycle})", (cycle_id, chosen)):
        duels[row["step_id"]][row["a"], row["b"]] = duel_of(row)
    steps = store.query(f"SELECT s.*, r.task_id {of_cycle} ORDER BY t.slot, s.position", (cycle_id, chosen))
    return [DecidedStep(_step(row), row["task_id"], tuple(candidates[row["id"]]), duels[row["id"]]) for row in steps]


def agreed_steps(store: Store, cycle_id: str) -> list[DecidedStep]:
    """Every step of the cycle on which all samples said the same, in rollouts that ended with an answer."""
    answered = store.query("SELECT id FROM rollouts WHERE cycle_id = ? AND outcome = 'answered'", (cycle_id,))
    ids = {row["id"] for row in answered}
    return [step for step in steps_picked_by(store, cycle_id, ("agreed",)) if step.step.rollout_id in ids]


def insert_pairs(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Write the cycle's pairs, all at once; those that are there already stay."""
    db.executemany(
        "INSERT OR IGNORE INTO pairs (id, cycle_id, step_id, chosen, rejected, kind, margin, created_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )


def _step(row: Mapping[str, Any]) -> StepRow:
    values = {key: row[key] for key in StepRow.__dataclass_fields__}
    return StepRow(**values | {"simulated": bool(row["simulated"])})


def _candidate(row: Mapping[str, Any]) -> CandidateRow:
    values = {key: row[key] for key in CandidateRow.__dataclass_fields__}
    values["token_ids"] = tuple(json.loads(row["token_ids"]))
    values["final"], values["simulated"] = bool(row["final"]), bool(row["simulated"])
    values["images"] = tuple(json.loads(row["images"]))
    return CandidateRow(**values)


def drop_steps(db: sqlite3.Connection, rollout_id: str, from_position: int) -> None:
    """Forget a rollout's steps from a position on, with their candidates and comparisons."""
    db.execute("DELETE FROM steps WHERE rollout_id = ? AND position >= ?", (rollout_id, from_position))
