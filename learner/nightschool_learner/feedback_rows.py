"""What callers said of answers, as training rows: corrections for SFT, thumbs for KTO, in TRL's conversational formats.

    corrections.jsonl   {"prompt": [...], "completion": [{"role": "assistant", "content": CORRECTION}], ...}
    thumbs.jsonl        {"prompt": [...], "completion": [{"role": "assistant", "content": ANSWER}], "label": true, ...}

both with "tools", "images" (sha256), "response_id" and "adapter". The prompt is what the model had been told when it
wrote its last answer. Only requests that allow training, of sessions that are not reserved, and no held-out task. A
correction after a tool error is left out: it would teach to answer past the error; so is a rating of one of several
answers.

Owns the SQL, the screen and the files; redaction happened when the log was written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightschool_server.chat import (
    Message,
    ToolSpec,
    canonical_json,
    messages_from_json,
    system,
    template_messages,
    template_tools,
)
from nightschool_server.home import CORRECTIONS_FILE, THUMBS_FILE
from nightschool_server.store.store import Store

from nightschool_learner.contamination import held_out_of
from nightschool_learner.pair_export import shown_tools, write_rows
from nightschool_learner.screening import HeldOut, task_key
from nightschool_learner.seeds import is_reserved
from nightschool_learner.stages import Cycle


@dataclass(frozen=True)
class Rated:
    """A logged request with what was said of its answer."""

    response_id: str
    adapter: str
    session_id: str
    is_task: bool
    num_tool_errors: int
    messages: tuple[Message, ...]
    """All but the answer."""
    answer: str
    num_answers: int
    """In a row at the end: more than one where several were asked for."""
    tools: tuple[ToolSpec, ...]
    """That the caller brought."""
    correction: str
    """The latest one; empty where there is none."""
    good: bool | None
    """The latest thumb."""


@dataclass(frozen=True)
class FeedbackRows:
    """The rows, and how many ratings were left out, by reason."""

    corrections: tuple[dict[str, Any], ...]
    thumbs: tuple[dict[str, Any], ...]
    dropped: Mapping[str, int]


def write_feedback_files(cycle: Cycle) -> dict[str, int]:
    """Write the cycle's corrections.jsonl and thumbs.jsonl, each whole or not at all. Returns counts."""
    limit = cycle.config.pairs.max_feedback
    if not limit:
        return {}
    share = cycle.config.seeds.reserved_session_share
    rated = rated_requests(cycle.store, limit)
    rows = feedback_rows(rated, held_out_of(cycle), share, cycle.app.system_prompt, shown_tools(cycle))
    write_rows(cycle.folder / CORRECTIONS_FILE, rows.corrections)
    write_rows(cycle.folder / THUMBS_FILE, rows.thumbs)
    counts = {"corrections": len(rows.corrections), "thumbs": len(rows.thumbs)}
    return {**counts, **{f"feedback_dropped_{reason}": n for reason, n in rows.dropped.items()}}


def feedback_rows(
    rated: Sequence[Rated],
    held_out: HeldOut,
    reserved_share: float,
    system_prompt: str,
    tools: Sequence[ToolSpec],
) -> FeedbackRows:
    """Screen what was said and write it as rows. Tasks were told `system_prompt` and `tools`, model calls neither."""
    dropped: Counter[str] = Counter()
    corrections: list[dict[str, Any]] = []
    thumbs: list[dict[str, Any]] = []
    for request in rated:
        if reason := _refusal(request, held_out, reserved_share):
            dropped[reason] += 1
            continue
        row = _row(request, system_prompt, tools)
        if request.correction and request.num_tool_errors:
            dropped["after_tool_error"] += 1
        elif request.correction:
            corrections.append({**row, "completion": _said(request.correction)})
        if request.good is not None:
            thumbs.append({**row, "completion": _said(request.answer), "label": request.good})
    return FeedbackRows(tuple(corrections), tuple(thumbs), dict(dropped))


def rated_requests(store: Store, limit: int) -> list[Rated]:
    """The newest `limit` answered requests that may be learned from and of which something was said."""
    rows = store.query(
        "SELECT r.id, r.adapter, r.session_id, r.method, r.tools, r.num_tool_errors, "
        " (SELECT f.correction FROM feedback f WHERE f.response_id = r.id AND f.correction <> '' "
        "  ORDER BY f.created_at DESC, f.id DESC LIMIT 1) AS correction, "
        " (SELECT f.good FROM feedback f WHERE f.response_id = r.id AND f.good IS NOT NULL "
        "  ORDER BY f.created_at DESC, f.id DESC LIMIT 1) AS good, "
        " (SELECT json_group_array(json_object('role', m.role, 'parts', json(m.parts), 'sampled', m.sampled)) FROM "
        "  (SELECT * FROM messages WHERE response_id = r.id ORDER BY position) m) AS turns "
        "FROM requests r WHERE r.policy = 'train' AND r.status = 'OK' AND r.outcome IN ('', 'answered') "
        "AND r.id IN (SELECT response_id FROM feedback WHERE good IS NOT NULL OR correction <> '') "
        "ORDER BY r.created_at DESC, r.id DESC LIMIT ?",
        (limit,),
    )
    return [_rated(row) for row in rows]


def _rated(row: Mapping[str, Any]) -> Rated:
    turns = json.loads(row["turns"])
    messages = messages_from_json(canonical_json([{"role": t["role"], "parts": t["parts"]} for t in turns]))
    sampled = [bool(turn["sampled"]) for turn in turns]
    num_answers = next((n for n, one in enumerate(reversed(sampled)) if not one), len(sampled))
    return Rated(
        response_id=row["id"],
        adapter=row["adapter"],
        session_id=row["session_id"] or "",
        is_task=row["method"] == "task",
        num_tool_errors=row["num_tool_errors"],
        messages=messages[:-1],
        answer=messages[-1].text if messages else "",
        num_answers=num_answers,
        tools=tuple(
            ToolSpec(tool["name"], tool["description"], canonical_json(tool["parameters"]))
            for tool in json.loads(row["tools"])
        ),
        correction=row["correction"] or "",
        good=None if row["good"] is None else bool(row["good"]),
    )


def _refusal(request: Rated, held_out: HeldOut, reserved_share: float) -> str:
    if request.num_answers != 1 or not request.answer.strip():
        return "not_one_answer"
    if is_reserved(request.session_id, reserved_share):
        return "reserved"
    asked = [message for message in request.messages if message.role == "user"]
    is_held_out = any(held_out.match(task_key(message.text, message.images)) for message in asked)
    return "held_out" if is_held_out else ""


def _row(request: Rated, system_prompt: str, tools: Sequence[ToolSpec]) -> dict[str, Any]:
    messages = request.messages
    if request.is_task and system_prompt and messages[0].role != "system":
        messages = (system(system_prompt), *messages)
    told = (*tools, *request.tools) if request.is_task else request.tools
    return {
        "prompt": template_messages(messages),
        "tools": template_tools(told),
        "images": [sha256 for message in messages for sha256 in message.images],
        "response_id": request.response_id,
        "adapter": request.adapter,
    }


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
