"""The rows of cycles and their stages: what is queued, what runs, who holds it, how far it is.

Owns the SQL of `cycles`, `stages` and `learner` on the learner's side. Every function is one read or one
transaction. The rows of practice are in `seed_records.py` and `practice_records.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nightschool_server.chat import canonical_json
from nightschool_server.ids import new_id
from nightschool_server.store.store import Store

from nightschool_learner.stages import STAGE_NAMES, Progress

ENDED = ("promoted", "rejected", "stopped", "cancelled", "failed")


@dataclass(frozen=True)
class CycleRow:
    """A row of `cycles`."""

    id: str
    state: str
    trigger: str
    reason: str
    overrides: tuple[str, ...]
    config: str
    """The resolved `[learner]` table as JSON, once the cycle has started."""
    seed: int
    incumbent: str | None
    candidate: str | None
    cancel_reason: str | None
    num_resumes: int
    lease_pid: int | None
    lease_until: float | None
    created_at: float


_COLUMNS = ", ".join(CycleRow.__dataclass_fields__)


def open_cycle(store: Store) -> CycleRow | None:
    """The cycle to run now: the one that runs already (a restart), else the oldest queued one."""
    rows = store.query(
        f"SELECT {_COLUMNS} FROM cycles WHERE state IN ('running', 'queued') "
        "ORDER BY state = 'queued', created_at, id LIMIT 1"
    )
    return _cycle(rows[0]) if rows else None


def get_cycle(store: Store, cycle_id: str) -> CycleRow:
    """The row of a cycle that is known to exist."""
    return _cycle(store.query(f"SELECT {_COLUMNS} FROM cycles WHERE id = ?", (cycle_id,))[0])


def candidate_of(store: Store, cycle_id: str) -> str | None:
    """The adapter that the cycle trained, once it is registered."""
    return get_cycle(store, cycle_id).candidate


def set_candidate(store: Store, cycle_id: str, name: str) -> None:
    """Record the adapter that the cycle trained."""
    with store.transaction() as db:
        db.execute("UPDATE cycles SET candidate = ? WHERE id = ?", (name, cycle_id))


def active_adapter(store: Store) -> str:
    """The adapter that answers requests now."""
    return str(store.query("SELECT active FROM routes WHERE id = 1")[0]["active"])


def enqueue(store: Store, trigger: str, reason: str) -> str | None:
    """Queue a cycle, unless one is queued or running. Returns its id."""
    cycle_id = new_id("cycle")
    with store.transaction() as db:
        cursor = db.execute(
            "INSERT INTO cycles (id, state, trigger, reason, created_at) SELECT ?, 'queued', ?, ?, ? "
            "WHERE NOT EXISTS (SELECT 1 FROM cycles WHERE state IN ('queued', 'running'))",
            (cycle_id, trigger, reason, time.time()),
        )
        return cycle_id if cursor.rowcount == 1 else None


def num_new_seeds(store: Store) -> int:
    """Trainable requests since the newest cycle was queued."""
    rows = store.query(
        "SELECT COUNT(*) AS n FROM requests WHERE policy = 'train' AND status = 'OK' "
        "AND created_at > COALESCE((SELECT MAX(created_at) FROM cycles), 0)"
    )
    return int(rows[0]["n"])


def start(store: Store, row: CycleRow, *, seed: int, incumbent: str, config: str) -> CycleRow:
    """Take a queued cycle: fix its seed, incumbent and resolved configuration, and make its stage rows."""
    with store.transaction() as db:
        db.execute(
            "UPDATE cycles SET state = 'running', seed = ?, incumbent = ?, config = ?, started_at = ? "
            "WHERE id = ? AND state = 'queued'",
            (seed, incumbent, config, time.time(), row.id),
        )
        db.executemany(
            "INSERT OR IGNORE INTO stages (cycle_id, name, position, state) VALUES (?, ?, ?, 'pending')",
            [(row.id, name, position) for position, name in enumerate(STAGE_NAMES)],
        )
    return get_cycle(store, row.id)


def resume(store: Store, row: CycleRow) -> CycleRow:
    """Count the restart of a running cycle."""
    with store.transaction() as db:
        db.execute("UPDATE cycles SET num_resumes = num_resumes + 1 WHERE id = ?", (row.id,))
    return get_cycle(store, row.id)


def renew_lease(store: Store, cycle_id: str, pid: int, lease_s: float) -> None:
    """Say that `pid` holds the cycle for another `lease_s`."""
    with store.transaction() as db:
        db.execute(
            "UPDATE cycles SET lease_pid = ?, lease_until = ? WHERE id = ?", (pid, time.time() + lease_s, cycle_id)
        )


def finish(store: Store, cycle_id: str, state: str, outcome: str) -> None:
    """End the cycle. A stage that was running is marked failed where the cycle failed or was cancelled."""
    assert state in ENDED, state
    now = time.time()
    with store.transaction() as db:
        db.execute(
            "UPDATE cycles SET state = ?, outcome = ?, ended_at = ?, lease_pid = NULL, lease_until = NULL "
            "WHERE id = ? AND state IN ('queued', 'running')",
            (state, outcome, now, cycle_id),
        )
        db.execute(
            "UPDATE stages SET state = ?, message = ?, ended_at = ? WHERE cycle_id = ? AND state = 'running'",
            ("failed" if state in ("failed", "cancelled") else "done", outcome, now, cycle_id),
        )


def stage_states(store: Store, cycle_id: str) -> dict[str, str]:
    """State by stage name."""
    rows = store.query("SELECT name, state FROM stages WHERE cycle_id = ? ORDER BY position", (cycle_id,))
    return {row["name"]: row["state"] for row in rows}


def stage_counts(store: Store, cycle_id: str, name: str) -> dict[str, int]:
    """The counts that the stage's row holds."""
    rows = store.query("SELECT counts FROM stages WHERE cycle_id = ? AND name = ?", (cycle_id, name))
    return dict(json.loads(rows[0]["counts"])) if rows else {}


def start_stage(store: Store, cycle_id: str, name: str) -> None:
    """Mark a stage as running; a resumed one keeps its start."""
    with store.transaction() as db:
        db.execute(
            "UPDATE stages SET state = 'running', started_at = COALESCE(started_at, ?) "
            "WHERE cycle_id = ? AND name = ? AND state IN ('pending', 'running')",
            (time.time(), cycle_id, name),
        )


def end_stage(store: Store, cycle_id: str, name: str) -> None:
    """Mark a stage as done."""
    with store.transaction() as db:
        db.execute(
            "UPDATE stages SET state = 'done', ended_at = ? WHERE cycle_id = ? AND name = ?",
            (time.time(), cycle_id, name),
        )


def update_stage(store: Store, cycle_id: str, progress: Progress) -> None:
    """Write a stage's progress."""
    counts = canonical_json(progress.counts)
    with store.transaction() as db:
        db.execute(
            "UPDATE stages SET num_done = ?, num_total = ?, counts = ?, message = ? WHERE cycle_id = ? AND name = ?",
            (progress.num_done, progress.num_total, counts, progress.message, cycle_id, progress.name),
        )


def stage_report(store: Store, cycle_id: str) -> list[dict[str, Any]]:
    """Every stage's counts and times, in order: the funnel of the cycle's report."""
    rows = store.query(
        "SELECT name, state, num_done, num_total, counts, message, started_at, ended_at FROM stages "
        "WHERE cycle_id = ? ORDER BY position",
        (cycle_id,),
    )
    return [{**row, "counts": json.loads(row["counts"])} for row in rows]


def is_paused(store: Store) -> bool:
    """Whether an operator paused the learner."""
    return bool(store.query("SELECT paused FROM learner WHERE id = 1")[0]["paused"])


def heartbeat(store: Store, pid: int, next_run_at: float | None) -> None:
    """Say that the learner lives."""
    with store.transaction() as db:
        db.execute(
            "UPDATE learner SET pid = ?, last_seen_at = ?, next_run_at = ? WHERE id = 1",
            (pid, time.time(), next_run_at),
        )


def set_last_error(store: Store, message: str) -> None:
    """Show operators what went wrong last; empty to clear."""
    with store.transaction() as db:
        db.execute("UPDATE learner SET last_error = ? WHERE id = 1", (message,))


def _cycle(row: Mapping[str, object]) -> CycleRow:
    values = {key: row[key] for key in CycleRow.__dataclass_fields__}
    values["overrides"] = tuple(json.loads(str(row["overrides"])))
    return CycleRow(**values)  # type: ignore[arg-type]
