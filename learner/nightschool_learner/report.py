"""The cycle's report: how many seeds became tasks, steps, pairs, and what the gate said. One JSON file.

Owns `report.json` in the cycle's folder; everything in it is read from rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nightschool_server.store.store import Store

from nightschool_learner import records
from nightschool_learner.audit import latest_audit
from nightschool_learner.endpoint_records import cost_report

REPORT_FILE = "report.json"


def write(folder: Path, store: Store, cycle_id: str) -> Path:
    """Write the report of a cycle that has ended. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(build(store, cycle_id), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def write_missing(cycles: Path, store: Store) -> None:
    """Write the report of every cycle that ended as its learner was killed."""
    for row in store.query("SELECT id FROM cycles WHERE started_at IS NOT NULL AND ended_at IS NOT NULL"):
        folder = cycles / row["id"]
        if folder.is_dir() and not (folder / REPORT_FILE).exists():
            write(folder, store, row["id"])


def build(store: Store, cycle_id: str) -> dict[str, Any]:
    """The report: the cycle, its funnel, every stage with counts and seconds, what endpoints cost, the evaluation."""
    cycle = dict(
        store.query(
            "SELECT id, state, trigger, reason, outcome, seed, incumbent, candidate, num_resumes, created_at, "
            "started_at, ended_at FROM cycles WHERE id = ?",
            (cycle_id,),
        )[0]
    )
    stages = records.stage_report(store, cycle_id)
    for stage in stages:
        if stage["started_at"] and stage["ended_at"]:
            stage["seconds"] = round(stage["ended_at"] - stage["started_at"], 3)
    evaluations = store.query(
        "SELECT * FROM evaluations WHERE cycle_id = ? ORDER BY created_at DESC LIMIT 1", (cycle_id,)
    )
    return {
        "cycle": cycle,
        "funnel": _funnel(store, cycle_id),
        "stages": stages,
        "endpoints": cost_report(store, cycle_id),
        "critic_audit": latest_audit(store, cycle_id),
        "evaluation": dict(evaluations[0]) if evaluations else None,
    }


_FUNNEL = {
    "seeds": "SELECT COUNT(*) AS n FROM cycle_seeds WHERE cycle_id = ?",
    "slots": "SELECT COUNT(*) AS n FROM tasks WHERE cycle_id = ?",
    "tasks_kept": "SELECT COUNT(*) AS n FROM tasks WHERE cycle_id = ? AND state = 'kept'",
    "rollouts": "SELECT COUNT(*) AS n FROM rollouts WHERE cycle_id = ?",
    "steps": "SELECT COUNT(*) AS n FROM steps s JOIN rollouts r ON r.id = s.rollout_id WHERE r.cycle_id = ?",
    "steps_decided": "SELECT COUNT(*) AS n FROM steps s JOIN rollouts r ON r.id = s.rollout_id "
    "WHERE r.cycle_id = ? AND s.picked_by IN ('facts', 'critic')",
    "pairs": "SELECT COUNT(*) AS n FROM pairs WHERE cycle_id = ?",
}


def _funnel(store: Store, cycle_id: str) -> dict[str, int]:
    return {name: int(store.query(sql, (cycle_id,))[0]["n"]) for name, sql in _FUNNEL.items()}
