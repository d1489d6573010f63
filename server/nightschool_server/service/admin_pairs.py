"""What operators read of preference pairs: lists, one with all that it rests on, and lines that trainers read.

Owns the SQL and the way from rows to the wire; the learner writes these rows (its `practice_records.py`). Every
function is a read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nightschool_proto.v1 import admin_pb2

from nightschool_server import chat
from nightschool_server.errors import UnknownPairError
from nightschool_server.home import Home
from nightschool_server.service.pages import Page
from nightschool_server.service.wire_replies import messages_to_proto, timestamp
from nightschool_server.store.store import Store

Row = Mapping[str, Any]

PAGE = 200
"""Pairs that an export reads at once."""

_PAIRS = (
    "SELECT p.*, s.position AS step, s.history, r.task_id, r.adapter, t.prompt AS task_prompt, y.candidate AS trained, "
    "c.text AS chosen_text, d.text AS rejected_text, c.token_ids AS chosen_ids, d.token_ids AS rejected_ids, "
    "s.simulated OR c.simulated OR d.simulated AS simulated "
    "FROM pairs p JOIN steps s ON s.id = p.step_id JOIN rollouts r ON r.id = s.rollout_id "
    "JOIN tasks t ON t.id = r.task_id JOIN cycles y ON y.id = p.cycle_id "
    "JOIN candidates c ON c.id = p.chosen JOIN candidates d ON d.id = p.rejected"
)


def list_pairs(store: Store, page: Page, cycle_id: str) -> tuple[list[admin_pb2.Pair], str]:
    """Preference pairs, oldest first; of one cycle where `cycle_id` is not empty."""
    found = store.query(
        f"{_PAIRS} WHERE p.id > ? AND (? = '' OR p.cycle_id = ?) ORDER BY p.id LIMIT ?",
        (page.after[0] if page.after else "", cycle_id, cycle_id, page.size + 1),
    )
    kept, token = page.cut(found, lambda row: (row["id"],))
    return [_pair(row) for row in kept], token


def get_pair(store: Store, pair_id: str) -> admin_pb2.PairDetail:
    """One pair with all that it rests on. Raises UnknownPairError."""
    found = store.query(f"{_PAIRS} WHERE p.id = ?", (pair_id,))
    if not found:
        raise UnknownPairError(pair_id)
    row = found[0]
    sides = {c["id"]: c for c in store.query("SELECT * FROM candidates WHERE step_id = ?", (row["step_id"],))}
    chosen, rejected = sides[row["chosen"]], sides[row["rejected"]]
    seeds = store.query("SELECT response_id FROM task_seeds WHERE task_id = ? ORDER BY response_id", (row["task_id"],))
    return admin_pb2.PairDetail(
        pair=_pair(row),
        messages=messages_to_proto(chat.messages_from_json(row["history"])),
        chosen=_side(chosen),
        rejected=_side(rejected),
        verdicts=_verdicts(store, row["step_id"], chosen["position"], rejected["position"]),
        task_prompt=row["task_prompt"],
        seed_request_ids=[seed["response_id"] for seed in seeds],
        sampled_by=row["adapter"],
        trained=row["trained"] or "",
        created_at=timestamp(row["created_at"]),
        decided_by=_decided_by(store, row["step_id"], chosen, rejected),
    )


def export_pairs(store: Store, cycle_id: str, tools: Sequence[chat.ToolSpec]) -> Iterator[str]:
    """Lines of JSON in TRL's conversational preference format, one for each pair, with `tools` and image hashes."""
    rendered_tools = chat.template_tools(tools)
    after = ""
    while True:
        found = store.query(
            f"{_PAIRS} WHERE p.id > ? AND (? = '' OR p.cycle_id = ?) ORDER BY p.id LIMIT ?",
            (after, cycle_id, cycle_id, PAGE),
        )
        for row in found:
            yield json.dumps(_preference(row, rendered_tools), ensure_ascii=False) + "\n"
        if not found:
            return
        after = found[-1]["id"]


def export_feedback(home: Home, store: Store, name: str, cycle_id: str) -> Iterator[str]:
    """Lines of the learner's file `name`, of one cycle or of all, the newest first; each answer once."""
    newest_first = store.query("SELECT id FROM cycles WHERE ? IN ('', id) ORDER BY id DESC", (cycle_id,))
    seen: set[str] = set()
    for cycle in newest_first:
        path = home.cycles / cycle["id"] / name
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
            response_id = json.loads(line)["response_id"]
            if response_id not in seen:
                seen.add(response_id)
                yield line


def _pair(row: Row) -> admin_pb2.Pair:
    return admin_pb2.Pair(
        id=row["id"],
        cycle_id=row["cycle_id"],
        task_id=row["task_id"],
        step=row["step"],
        kind=row["kind"],
        prompt=_last_turn(row["history"]),
        chosen=row["chosen_text"],
        rejected=row["rejected_text"],
        margin=row["margin"],
        simulated=bool(row["simulated"]),
    )


def _side(row: Row) -> admin_pb2.PairSide:
    return admin_pb2.PairSide(
        text=row["text"],
        observation=row["observation"],
        failure=row["failure"],
        num_samples=row["num_samples"],
        logprob=row["logprob"],
        token_ids=json.loads(row["token_ids"]),
    )


def _decided_by(store: Store, step_id: str, chosen: Row, rejected: Row) -> str:
    """`facts`, or the critic's component; empty where its row is from before there were components."""
    if rejected["failure"]:
        return "facts"
    positions = sorted((chosen["position"], rejected["position"]))
    duel = store.one("SELECT component FROM duels WHERE step_id = ? AND a = ? AND b = ?", (step_id, *positions))
    return str(duel["component"]) if duel is not None else ""


def _verdicts(store: Store, step_id: str, chosen: int, rejected: int) -> list[admin_pb2.PairVerdict]:
    """The critic's comparisons of two positions, the one that showed the chosen first in front."""
    found = store.query(
        "SELECT first, verdict, margin, raw FROM critiques "
        "WHERE step_id = ? AND (first, second) IN (VALUES (?, ?), (?, ?)) ORDER BY first = ? DESC",
        (step_id, chosen, rejected, rejected, chosen, chosen),
    )
    return [
        admin_pb2.PairVerdict(
            chosen_first=row["first"] == chosen,
            verdict=row["verdict"],
            margin=row["margin"] if row["first"] == chosen else -row["margin"],
            raw=row["raw"],
        )
        for row in found
    ]


def _last_turn(history: str) -> str:
    """The text that the step answers: the last user turn, or the last tool's result."""
    last = chat.messages_from_json(history)[-1]
    results = [part.content for part in last.parts if isinstance(part, chat.ToolResult)]
    return last.text or "\n".join(results)


def _preference(row: Row, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    history = chat.messages_from_json(row["history"])
    return {
        "prompt": chat.template_messages(history),
        "chosen": [{"role": "assistant", "content": row["chosen_text"]}],
        "rejected": [{"role": "assistant", "content": row["rejected_text"]}],
        "tools": tools,
        "images": [sha256 for message in history for sha256 in message.images],
        "pair_id": row["id"],
        "kind": row["kind"],
        "margin": row["margin"],
        "simulated": bool(row["simulated"]),
        "chosen_token_ids": json.loads(row["chosen_ids"]),
        "rejected_token_ids": json.loads(row["rejected_ids"]),
        "cycle_id": row["cycle_id"],
        "task_id": row["task_id"],
        "step": row["step"],
        "sampled_by": row["adapter"],
        "trained": row["trained"] or "",
    }
