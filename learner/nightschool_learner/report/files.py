"""The report's two files in the cycle's folder: `report.html` for people, `report.json` for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nightschool_server.app import App, load_evaluation
from nightschool_server.errors import AppError
from nightschool_server.evaluation_set import EvaluationSet
from nightschool_server.home import REPORT_FILES
from nightschool_server.store.store import Store

from nightschool_learner.examiner import read_images
from nightschool_learner.report.contents import Report
from nightschool_learner.report.figures import funnel_counts
from nightschool_learner.report.gather import build
from nightschool_learner.report.page import render


def write(store: Store, cycle_id: str, app: App) -> None:
    """Write the report of a cycle that has ended, both files."""
    held_out = _held_out(app)
    folder = store.home.cycles / cycle_id
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    report: Report | None = None
    # Somebody may be forgotten while it is written: what it says must still be in the rows.
    while report is None or funnel_counts(store, cycle_id) != report.funnel:
        report = build(store, cycle_id, held_out)
        texts = {"html": render(report, store, _pictures(report, held_out)), "json": as_json(report)}
        for kind, name in REPORT_FILES.items():
            partial = folder / f".{name}"
            partial.write_text(texts[kind], encoding="utf-8")
            partial.chmod(0o600)
            partial.replace(folder / name)


def missing(store: Store) -> list[str]:
    """Cycles that ended and have no report: their learner was killed, or they showed a user who is forgotten."""
    rows = store.query("SELECT id FROM cycles WHERE started_at IS NOT NULL AND ended_at IS NOT NULL ORDER BY id")
    folders = [store.home.cycles / row["id"] for row in rows]
    return [
        folder.name
        for folder in folders
        if folder.is_dir() and not all((folder / name).exists() for name in REPORT_FILES.values())
    ]


def as_json(report: Report) -> str:
    """The report as text of JSON."""
    return json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"


def _held_out(app: App) -> EvaluationSet | None:
    try:
        return load_evaluation(app)
    except AppError:
        return None  # an application without held-out tasks, or whose file is broken by now


def _pictures(report: Report, held_out: EvaluationSet | None) -> Mapping[str, bytes]:
    """The pictures of the held-out tasks that the page shows."""
    ids = {changed.task_id for changed in report.changed if changed.images}
    found: dict[str, Any] = {}
    for task in held_out.tasks if held_out else ():
        if task.id in ids:
            found |= read_images(task)
    return found
