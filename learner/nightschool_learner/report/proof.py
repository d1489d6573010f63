"""What the gate's decision rests on: training's curves, held-out tasks that flipped, lineage."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nightschool_server.evaluation_set import EvaluationSet, EvaluationTask
from nightschool_server.store.store import Store
from pydantic import ValidationError

from nightschool_learner.evaluation_records import EvaluationRow
from nightschool_learner.evaluation_results import GREEDY, Basis, TaskResult, results_of
from nightschool_learner.examiner import read_images
from nightschool_learner.manifest import Result, RunFolder
from nightschool_learner.report.contents import Attempt, Changed, CycleFacts, Lineage, Link, Training
from nightschool_learner.report.conversation import shown
from nightschool_learner.report.examples import seed_requests_of

MAX_CHANGED = 20
"""Held-out tasks shown that became right, and as many that became wrong."""

Became = Literal["right", "wrong", "better", "worse"]
_GAINED, _LOST = ("right", "better"), ("wrong", "worse")


def training_of(folder: Path) -> Training | None:
    """What the trainer logged; None where it never took a step."""
    run = RunFolder(folder / "train")
    rows = run.read_metrics()
    if not rows:
        return None
    result = _result(run)
    keys = dict.fromkeys(key for row in rows for key in row if key not in ("step", "num_steps"))
    curves = {key: _curve(rows, key) for key in keys}
    return Training(
        num_pairs=result.num_pairs if result else 0,
        num_steps=int(rows[-1]["step"]),
        alarms=tuple(alarm.message for alarm in result.alarms) if result else (),
        final={key: value for key, value in result.metrics.items() if math.isfinite(value)} if result else {},
        curves={key: points for key, points in curves.items() if points},
    )


def changed_tasks(store: Store, row: EvaluationRow, held_out: EvaluationSet | None) -> tuple[Changed, ...]:
    """Tasks that the candidate solved and the incumbent did not, and the other way round: losses first.

    Where tasks have no answers, those whose answer the judge preferred in both orders.
    """
    basis = Basis(row.set_digest, row.protocol)
    before, after = (results_of(store, basis, name) for name in (row.incumbent, row.candidate))
    known = held_out.tasks if held_out is not None and held_out.digest == row.set_digest else ()
    tasks = {task.id: task for task in known}
    greedy = [key for key in before if key[1] == GREEDY and key in after]
    judged = _judged(store, row) if row.judge else None
    became = {key: _became(before[key], after[key], judged) for key in greedy}
    lost, gained = ([after[key] for key in greedy if became[key] in kind] for kind in (_LOST, _GAINED))
    return tuple(
        _changed(tasks.get(result.task_id), row, became[result.key], (before[result.key], result))
        for results in (lost, gained)
        for result in by_turns(results)[:MAX_CHANGED]
    )


def by_turns(results: Sequence[TaskResult]) -> list[TaskResult]:
    """One of each family, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for result in results:
        turns.append((seen[result.family], result))
        seen[result.family] += 1
    return [result for _, result in sorted(turns, key=lambda turn: turn[0])]


def lineage_of(store: Store, facts: CycleFacts, folder: Path) -> Lineage:
    """From the adapter back to the logged requests, pair by pair."""
    requests = seed_requests_of(store, facts.id)
    rows = store.query(
        "SELECT p.id, r.task_id FROM pairs p JOIN steps s ON s.id = p.step_id JOIN rollouts r ON r.id = s.rollout_id "
        "WHERE p.cycle_id = ? ORDER BY p.id",
        (facts.id,),
    )
    links = tuple(Link(row["id"], row["task_id"], requests.get(row["task_id"], ())) for row in rows)
    used = sorted({request for link in links for request in link.request_ids})
    callers = store.query(
        "SELECT COUNT(DISTINCT caller) AS n FROM requests WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(used),),
    )
    result = _result(RunFolder(folder / "train"))
    return Lineage(
        adapter=facts.candidate or "",
        parent=facts.incumbent or "",
        pairs_sha256=result.pairs_sha256 if result else "",
        num_pairs=len(links),
        num_tasks=len({link.task_id for link in links}),
        num_requests=len(used),
        num_callers=int(callers[0]["n"]),
        links=links,
    )


def _became(before: TaskResult, after: TaskResult, judged: Mapping[str, Became] | None) -> Became | None:
    if judged is not None:
        return judged.get(after.task_id)
    return None if before.success == after.success else "right" if after.success else "wrong"


def _judged(store: Store, row: EvaluationRow) -> dict[str, Became]:
    """What became of a task's answer, where the judge preferred the same one in both orders."""
    found = store.query(
        "SELECT task_id, MIN(winner) AS winner FROM evaluation_judgements WHERE cycle_id = ? "
        "GROUP BY task_id HAVING COUNT(*) = 2 AND MIN(winner) = MAX(winner) AND MIN(winner) <> 'none'",
        (row.cycle_id,),
    )
    return {one["task_id"]: "better" if one["winner"] == "candidate" else "worse" for one in found}


def _changed(
    task: EvaluationTask | None, row: EvaluationRow, became: Became | None, results: tuple[TaskResult, TaskResult]
) -> Changed:
    before, after = results
    assert became is not None, "only tasks that changed are shown"
    return Changed(
        task_id=after.task_id,
        family=after.family,
        became=became,
        question=shown(task.prompt) if task else "",
        images=tuple(read_images(task)) if task else (),
        expected=shown(task.answer) if task else "",
        before=_attempt(row.incumbent, before),
        after=_attempt(row.candidate, after),
    )


def _attempt(adapter: str, result: TaskResult) -> Attempt:
    return Attempt(adapter, shown(result.answer), result.outcome, result.num_steps, ())


def _result(run: RunFolder) -> Result | None:
    try:
        return run.read_result()
    except ValidationError:
        return None  # another version wrote it: the rows and the metrics still tell the cycle


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    points = [(float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
    return tuple(point for point in points if math.isfinite(point[1]))
