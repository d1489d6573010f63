"""Pairs as the trainer reads them: TRL's conversational preference format, one JSON object a line.

    {"prompt": [...], "chosen": [{"role": "assistant", "content": ...}], "rejected": [...], "tools": [...] | null,
     "images": ["<sha256>", ...], "pair_id": ..., "kind": ..., "margin": ..., "simulated": ...,
     "chosen_token_ids": [...], "rejected_token_ids": [...]}

A pair of an earlier cycle (see `replay.py`) has `replayed_from` beside these.

Prompt messages are what the chat template was given when the candidates were sampled; the content of chosen and
rejected is the sampled text, verbatim, and the token ids beside it are the sampled tokens, so that a trainer can
prove that it trains on them. `images` names blobs of the home folder. Anchors (see `anchors.py`) have the same
form with `step_id`, `answer` and `answer_token_ids` in place of the pair.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nightschool_server.agent.formats import action_format
from nightschool_server.chat import ToolSpec, messages_from_json, template_messages, template_tools
from nightschool_server.store.store import Store

from nightschool_learner.practice_records import DecidedStep
from nightschool_learner.stages import Cycle

PAIRS_FILE = "pairs.jsonl"
ANCHORS_FILE = "anchors.jsonl"


def export_rows(store: Store, cycle_id: str, tools: Sequence[ToolSpec] = ()) -> list[dict[str, Any]]:
    """Every pair of the cycle, in the order in which they were practised, beside the `tools` of their prompts."""
    rows = store.query(
        "SELECT p.id, p.kind, p.margin, s.history, c.text AS chosen, c.token_ids AS chosen_ids, "
        " r.text AS rejected, r.token_ids AS rejected_ids, s.simulated OR c.simulated OR r.simulated AS simulated "
        "FROM pairs p JOIN steps s ON s.id = p.step_id JOIN candidates c ON c.id = p.chosen "
        "JOIN candidates r ON r.id = p.rejected "
        "JOIN rollouts o ON o.id = s.rollout_id JOIN tasks t ON t.id = o.task_id "
        "WHERE p.cycle_id = ? ORDER BY t.slot, s.position, r.position",
        (cycle_id,),
    )
    rendered_tools = template_tools(tools)
    exported = []
    for row in rows:
        history = messages_from_json(row["history"])
        exported.append(
            {
                "prompt": template_messages(history),
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
                "tools": rendered_tools,
                "images": [sha256 for message in history for sha256 in message.images],
                "pair_id": row["id"],
                "kind": row["kind"],
                "margin": row["margin"],
                "simulated": bool(row["simulated"]),
                "chosen_token_ids": json.loads(row["chosen_ids"]),
                "rejected_token_ids": json.loads(row["rejected_ids"]),
            }
        )
    return exported


def export_anchors(steps: Sequence[DecidedStep], tools: Sequence[ToolSpec] = ()) -> list[dict[str, Any]]:
    """The steps' one candidate each as anchor rows."""
    rendered_tools = template_tools(tools)
    exported = []
    for step in steps:
        (candidate,) = step.candidates
        history = messages_from_json(step.step.history)
        exported.append(
            {
                "prompt": template_messages(history),
                "answer": [{"role": "assistant", "content": candidate.text}],
                "tools": rendered_tools,
                "images": [sha256 for message in history for sha256 in message.images],
                "step_id": step.step.id,
                "answer_token_ids": list(candidate.token_ids),
            }
        )
    return exported


def write_pairs_file(cycle: Cycle, replayed: Sequence[dict[str, Any]] = ()) -> Path:
    """Write the cycle's pairs.jsonl, `replayed` rows behind its own, whole or not at all. Returns its path."""
    fresh = export_rows(cycle.store, cycle.id, shown_tools(cycle))
    return write_rows(cycle.folder / PAIRS_FILE, [*fresh, *replayed])


def write_anchors_file(cycle: Cycle, steps: Sequence[DecidedStep]) -> Path:
    """Write the cycle's anchors.jsonl, whole or not at all. Returns its path."""
    return write_rows(cycle.folder / ANCHORS_FILE, export_anchors(steps, shown_tools(cycle)))


def shown_tools(cycle: Cycle) -> tuple[ToolSpec, ...]:
    """The tools that the chat template was given when the cycle practised."""
    return action_format(cycle.agent).shown(cycle.tools)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSON lines, whole or not at all. Returns the path."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
