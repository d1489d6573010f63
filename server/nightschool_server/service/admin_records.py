"""What operators read of the learner's rows: cycles with their stages, evaluations and tasks.

Pairs are `admin_pairs.py`'s. Owns the SQL and the way from rows to the wire; the learner writes these rows (its
`records.py` and `practice_records.py`). Every function is a read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from nightschool_proto.v1 import admin_pb2

from nightschool_server.chat import file_from_dict
from nightschool_server.errors import UnknownCycleError
from nightschool_server.service.pages import Page
from nightschool_server.service.wire_replies import file_to_proto, timestamp
from nightschool_server.store.store import Store

Row = Mapping[str, Any]
M = TypeVar("M", bound=Message)

ENDED_STATES = frozenset({"promoted", "rejected", "stopped", "cancelled", "failed"})


@dataclass(frozen=True)
class CycleRows:
    """All rows of one cycle; two are equal when nothing has happened between them."""

    cycle: Row
    stages: Sequence[Row]
    evaluation: Row | None
    families: Sequence[Row]
    """Of tasks."""

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self.cycle["state"] in ENDED_STATES


def cycle_rows(store: Store, cycle_id: str) -> CycleRows:
    """The rows of a cycle. Raises UnknownCycleError."""
    found = store.query("SELECT * FROM cycles WHERE id = ?", (cycle_id,))
    if not found:
        raise UnknownCycleError(cycle_id)
    # The lease is renewed all the time and says nothing to an operator.
    cycle = {key: value for key, value in dict(found[0]).items() if not key.startswith("lease_")}
    stages = [
        dict(row) for row in store.query("SELECT * FROM stages WHERE cycle_id = ? ORDER BY position", (cycle_id,))
    ]
    evaluations = store.query(
        "SELECT * FROM evaluations WHERE cycle_id = ? ORDER BY created_at DESC, id DESC LIMIT 1", (cycle_id,)
    )
    families = store.query(
        "SELECT family AS name, num_tasks, solve_rate, num_pairs FROM families WHERE cycle_id = ? "
        "ORDER BY num_tasks DESC, family",
        (cycle_id,),
    )
    evaluation = dict(evaluations[0]) if evaluations else None
    return CycleRows(cycle, stages, evaluation, [dict(row) for row in families])


def cycle_to_proto(rows: CycleRows) -> admin_pb2.Cycle:
    """A cycle with its stages, their rates and what is left of them."""
    cycle = rows.cycle
    return admin_pb2.Cycle(
        id=cycle["id"],
        state=admin_pb2.Cycle.State.Value(cycle["state"].upper()),
        trigger=cycle["trigger"],
        reason=cycle["reason"],
        created_at=timestamp(cycle["created_at"]),
        started_at=timestamp(cycle["started_at"]),
        ended_at=timestamp(cycle["ended_at"]),
        stages=[_stage(row) for row in rows.stages],
        incumbent=cycle["incumbent"] or "",
        candidate=cycle["candidate"] or "",
        evaluation=evaluation_to_proto(rows.evaluation) if rows.evaluation else None,
        outcome=cycle["outcome"],
        num_resumes=cycle["num_resumes"],
        task_families=[admin_pb2.TaskFamily(**row) for row in rows.families],
    )


def list_cycles(store: Store, page: Page) -> tuple[list[admin_pb2.Cycle], str]:
    """Cycles, newest first, and the next page's token."""
    before = page.after[0] if page.after else "~"
    found = store.query("SELECT id FROM cycles WHERE id < ? ORDER BY id DESC LIMIT ?", (before, page.size + 1))
    kept, token = page.cut(found, lambda row: (row["id"],))
    return [cycle_to_proto(cycle_rows(store, row["id"])) for row in kept], token


def list_tasks(store: Store, page: Page, cycle_id: str) -> tuple[list[admin_pb2.Task], str]:
    """Tasks that were written, oldest first; of one cycle where `cycle_id` is not empty."""
    found = store.query(
        "SELECT t.*, (SELECT json_group_array(s.response_id) FROM task_seeds s WHERE s.task_id = t.id) AS seeds, "
        "(SELECT COUNT(*) FROM candidates c JOIN steps s ON s.id = c.step_id JOIN rollouts r ON r.id = s.rollout_id "
        " WHERE r.task_id = t.id AND c.simulated) AS num_simulated, "
        "(SELECT json_group_array(json_object('name', f.name, 'type', f.type, 'description', f.description, "
        " 'source', f.source, 'sha256', f.sha256, 'similarity', f.similarity, 'request_id', f.response_id, "
        " 'num_attempts', f.num_attempts)) FROM (SELECT * FROM task_files WHERE task_id = t.id ORDER BY position) f"
        ") AS origins, "
        "(SELECT json_object('verdict', v.verdict, 'reason', v.reason, 'original_prompt', v.original) "
        " FROM verifications v WHERE v.task_id = t.id ORDER BY v.attempt DESC LIMIT 1) AS verification "
        "FROM tasks t WHERE t.id > ? AND (? = '' OR t.cycle_id = ?) ORDER BY t.id LIMIT ?",
        (page.after[0] if page.after else "", cycle_id, cycle_id, page.size + 1),
    )
    kept, token = page.cut(found, lambda row: (row["id"],))
    return [_task(row) for row in kept], token


def evaluation_to_proto(row: Row) -> admin_pb2.Evaluation:
    """A candidate against an incumbent."""
    return admin_pb2.Evaluation(
        id=row["id"],
        candidate=row["candidate"],
        incumbent=row["incumbent"],
        n=row["n"],
        incumbent_success=row["incumbent_success"],
        candidate_success=row["candidate_success"],
        interval_low=row["interval_low"],
        interval_high=row["interval_high"],
        interval_level=row["interval_level"],
        num_gained=row["num_gained"],
        num_lost=row["num_lost"],
        p_value=row["p_value"],
        passed=bool(row["passed"]),
        reasons=json.loads(row["reasons"]),
        families=[admin_pb2.FamilyResult(**family) for family in json.loads(row["families"])],
        set_digest=row["set_digest"],
        set_version=row["set_version"],
        detectable=row["detectable"],
        rules=[admin_pb2.GateRule(**rule) for rule in json.loads(row["rules"])],
        sampled=_parsed(row["sampled"], admin_pb2.SampledResult()),
        ability=_parsed(row["ability"], admin_pb2.Ability()),
        judge=_parsed(row["judge"], admin_pb2.JudgeResult()),
        early_stop=_parsed(row["early_stop"], admin_pb2.EarlyStop()),
        notes=json.loads(row["notes"]),
        thresholds_json=row["thresholds"],
    )


def _parsed(cell: str, message: M) -> M | None:
    """A JSON cell whose field names are the wire's; None for `null`."""
    found = json.loads(cell)
    return ParseDict(found, message) if found is not None else None


def _stage(row: Row) -> admin_pb2.Stage:
    rate, eta = 0.0, 0.0
    if row["started_at"] is not None:
        elapsed = (row["ended_at"] or time.time()) - row["started_at"]
        rate = row["num_done"] / elapsed if elapsed > 0 else 0.0
        if row["state"] == "running" and rate > 0:
            eta = max(0, row["num_total"] - row["num_done"]) / rate
    return admin_pb2.Stage(
        name=row["name"],
        state=admin_pb2.Stage.State.Value(row["state"].upper()),
        num_done=row["num_done"],
        num_total=row["num_total"],
        started_at=timestamp(row["started_at"]),
        ended_at=timestamp(row["ended_at"]),
        rate_per_s=rate,
        eta_s=eta,
        counts=json.loads(row["counts"]),
        message=row["message"],
    )


def _task(row: Row) -> admin_pb2.Task:
    return admin_pb2.Task(
        id=row["id"],
        cycle_id=row["cycle_id"],
        prompt=row["prompt"],
        image_sha256=json.loads(row["images"]),
        state=row["state"],
        seed_request_ids=json.loads(row["seeds"]),
        created_at=timestamp(row["created_at"]),
        num_simulated=row["num_simulated"],
        files=[file_to_proto(file_from_dict(file)) for file in json.loads(row["files"])],
        origins=[admin_pb2.FileOrigin(**origin) for origin in json.loads(row["origins"])],
        verification=_parsed(row["verification"] or "null", admin_pb2.Verification()),
        solve_rate=row["solve_rate"],
    )
