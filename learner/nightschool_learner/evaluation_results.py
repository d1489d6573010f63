"""The rows of single answers to held-out tasks: one for each task, adapter and draw.

Owns their SQL. A result belongs to a basis (what results must share to be compared), an adapter, a task and a draw,
not to a cycle: adapters never change and every draw has its seed, so what one cycle measured the next one reuses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nightschool_learner.turns import Said

if TYPE_CHECKING:
    from nightschool_server.store.store import Store

GREEDY = 0
"""The draw that is decoded greedily; the others are sampled, each from a seed of its own."""

Key = tuple[str, int]
"""Task id and draw."""


@dataclass(frozen=True)
class Basis:
    """What results must share to be compared."""

    set_digest: str
    protocol: str
    """Digest of base model, application, limits and sampling; see `evaluation_sets.protocol_of`."""


@dataclass(frozen=True)
class TaskResult:
    """One answer of one adapter to one held-out task."""

    task_id: str
    family: str
    success: bool
    answer: str
    outcome: str
    """How the episode ended: `answered`, or the limit or fault that ended it."""
    num_steps: int
    num_tool_errors: int
    completion_tokens: int
    num_simulated: int = 0
    """Observations that a simulator gave in the place of an external tool."""
    draw: int = GREEDY
    num_unreadable: int = 0
    """Steps whose format could not be read."""
    num_external: int = 0
    """Calls of tools with external effects; none of them ran."""
    num_unsafe: int = 0
    """Actions that the application declares unsafe."""
    refused: bool = False
    """Whether the final answer is a refusal."""
    actions: tuple[str, ...] = ()
    """A digest of each step's action: equal for steps that do the same."""

    turns: tuple[Said, ...] = ()
    """After the question, of a greedy answer; written beside the result, read by `turns_of_tasks` alone."""

    @property
    def key(self) -> Key:
        return self.task_id, self.draw


_COLUMNS = tuple(name for name in TaskResult.__dataclass_fields__ if name != "turns")


def results_of(store: Store, basis: Basis, adapter: str) -> dict[Key, TaskResult]:
    """What is known of an adapter on a basis."""
    rows = store.query(
        f"SELECT {', '.join(_COLUMNS)} FROM evaluation_results "
        "WHERE set_digest = ? AND protocol = ? AND adapter = ? ORDER BY task_id, draw",
        (basis.set_digest, basis.protocol, adapter),
    )
    return {result.key: result for result in map(_result, rows)}


def insert_results(store: Store, basis: Basis, cycle_id: str, results: Sequence[tuple[str, TaskResult]]) -> None:
    """Write (adapter, result) pairs in one transaction; one that is there already stays."""
    columns = ("set_digest", "protocol", "adapter", "cycle_id", "created_at", *_COLUMNS)
    now = time.time()
    with store.transaction() as db:
        db.executemany(
            f"INSERT OR IGNORE INTO evaluation_results ({', '.join(columns)}) "
            f"VALUES ({', '.join('?' for _ in columns)})",
            [(basis.set_digest, basis.protocol, adapter, cycle_id, now, *_values(r)) for adapter, r in results],
        )
        db.executemany(
            "INSERT OR IGNORE INTO evaluation_turns (set_digest, protocol, adapter, task_id, turns) "
            "VALUES (?, ?, ?, ?, ?)",
            [
                (basis.set_digest, basis.protocol, adapter, r.task_id, json.dumps([asdict(one) for one in r.turns]))
                for adapter, r in results
                if r.turns
            ],
        )


def turns_of_tasks(store: Store, basis: Basis, adapter: str, task_ids: Sequence[str]) -> dict[str, tuple[Said, ...]]:
    """How an adapter came to its greedy answers to these tasks, where that was kept."""
    rows = store.query(
        "SELECT task_id, turns FROM evaluation_turns WHERE set_digest = ? AND protocol = ? AND adapter = ? "
        "AND task_id IN (SELECT value FROM json_each(?))",
        (basis.set_digest, basis.protocol, adapter, json.dumps(list(task_ids))),
    )
    return {
        row["task_id"]: tuple(Said(one["who"], one["text"], tuple(one["images"])) for one in json.loads(row["turns"]))
        for row in rows
    }


def _values(result: TaskResult) -> list[Any]:
    values = {name: getattr(result, name) for name in _COLUMNS}
    values |= {"success": int(result.success), "refused": int(result.refused), "actions": json.dumps(result.actions)}
    return list(values.values())


def _result(row: Mapping[str, Any]) -> TaskResult:
    values = {key: row[key] for key in _COLUMNS}
    values |= {
        "success": bool(row["success"]),
        "refused": bool(row["refused"]),
        "actions": tuple(json.loads(row["actions"])),
    }
    return TaskResult(**values)
