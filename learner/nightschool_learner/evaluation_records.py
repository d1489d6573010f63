"""The rows of evaluation: one result for each held-out task on each adapter, one evaluation for each decision.

Owns their SQL. A result belongs to (set, adapter, task), not to a cycle: adapters never change, decoding is
greedy, so what one cycle measured the next one reuses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nightschool_server.store.store import Store


@dataclass(frozen=True)
class TaskResult:
    """One held-out task on one adapter."""

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


_COLUMNS = ", ".join(TaskResult.__dataclass_fields__)


def results_of(store: Store, set_digest: str, adapter: str) -> dict[str, TaskResult]:
    """What is known of an adapter on a set, by task id."""
    rows = store.query(
        f"SELECT {_COLUMNS} FROM evaluation_results WHERE set_digest = ? AND adapter = ? ORDER BY task_id",
        (set_digest, adapter),
    )
    return {row["task_id"]: _result(row) for row in rows}


def insert_results(store: Store, set_digest: str, cycle_id: str, results: Sequence[tuple[str, TaskResult]]) -> None:
    """Write (adapter, result) pairs in one transaction; one that is there already stays."""
    now = time.time()
    with store.transaction() as db:
        db.executemany(
            f"INSERT OR IGNORE INTO evaluation_results (set_digest, adapter, cycle_id, created_at, {_COLUMNS}) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    set_digest, adapter, cycle_id, now, r.task_id, r.family, int(r.success), r.answer, r.outcome,
                    r.num_steps, r.num_tool_errors, r.completion_tokens, r.num_simulated,
                )
                for adapter, r in results
            ],
        )  # fmt: skip


@dataclass(frozen=True)
class EvaluationRow:
    """A row of `evaluations`: a decision of the gate with its numbers."""

    id: str
    cycle_id: str
    candidate: str
    incumbent: str
    set_digest: str
    n: int
    incumbent_success: float
    candidate_success: float
    interval_low: float
    interval_high: float
    interval_level: float
    num_gained: int
    num_lost: int
    p_value: float
    passed: bool
    reasons: tuple[str, ...]
    families: Sequence[Mapping[str, Any]]
    """`{"family", "n", "incumbent_success", "candidate_success"}` each."""


def evaluation_of(store: Store, cycle_id: str) -> EvaluationRow | None:
    """The cycle's evaluation, once the gate has decided."""
    rows = store.query("SELECT * FROM evaluations WHERE cycle_id = ?", (cycle_id,))
    if not rows:
        return None
    values = {key: rows[0][key] for key in EvaluationRow.__dataclass_fields__}
    values["passed"] = bool(values["passed"])
    values["reasons"] = tuple(json.loads(values["reasons"]))
    values["families"] = json.loads(values["families"])
    return EvaluationRow(**values)


def insert_evaluation(store: Store, row: EvaluationRow) -> None:
    """Write the decision, once: the id derives from the cycle."""
    values = {key: getattr(row, key) for key in EvaluationRow.__dataclass_fields__}
    values |= {
        "passed": int(row.passed),
        "reasons": json.dumps(list(row.reasons), ensure_ascii=False),
        "families": json.dumps([dict(family) for family in row.families], ensure_ascii=False),
        "created_at": time.time(),
    }
    marks = ", ".join("?" for _ in values)
    with store.transaction() as db:
        db.execute(f"INSERT OR IGNORE INTO evaluations ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))


def _result(row: Mapping[str, Any]) -> TaskResult:
    values = {key: row[key] for key in TaskResult.__dataclass_fields__}
    return TaskResult(**values | {"success": bool(row["success"])})
