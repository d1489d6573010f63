"""The gold set: comparisons that people, or a rule, decided; the critic is measured against them.

From two places: the application's file (`App(gold=...)`), one JSON object a line,

    {"id": "tag-03", "task": "...", "images": ["tag.png"], "history": [{"role": "assistant", "text": "..."}],
     "a": {"action": "...", "observation": "..."}, "b": {...}, "better": "a" | "b" | "tie"}

with images beside it, and the labels that `nightschool pairs label` took. Owns reading and checking both; the numbers
are `audit.py`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nightschool_server.chat import Message, ToolCall, assistant, messages_from_json, tool_result, user
from nightschool_server.errors import AppError
from nightschool_server.store.store import Store

from nightschool_learner.critique import Context
from nightschool_learner.prompts import CandidateView

Better = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class GoldPair:
    """Two candidates and which one is better."""

    id: str
    context: Context
    a: CandidateView
    b: CandidateView
    better: Better


def read_gold(path: Path) -> list[GoldPair]:
    """The pairs of a file. Raises AppError with file, line and rule."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise AppError(f"gold set {path}: {error}") from error
    pairs = [_read_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    seen: set[str] = set()
    for pair in pairs:
        if pair.id in seen:
            raise AppError(f"gold set {path}: id {pair.id!r} is there twice: every pair needs one of its own")
        seen.add(pair.id)
    return pairs


def labelled_pairs(store: Store) -> list[GoldPair]:
    """The pairs that people labelled; where they disagree, the later label counts."""
    rows = store.query(
        "SELECT l.step_id, l.a, l.b, l.better, s.history, t.prompt, t.images, "
        " x.text AS a_text, x.observation AS a_seen, x.images AS a_images, "
        " y.text AS b_text, y.observation AS b_seen, y.images AS b_images "
        "FROM labels l JOIN steps s ON s.id = l.step_id JOIN rollouts r ON r.id = s.rollout_id "
        "JOIN tasks t ON t.id = r.task_id JOIN candidates x ON x.step_id = l.step_id AND x.position = l.a "
        "JOIN candidates y ON y.step_id = l.step_id AND y.position = l.b ORDER BY l.created_at"
    )
    found = {
        f"{row['step_id']}:{row['a']}:{row['b']}": GoldPair(
            f"{row['step_id']}:{row['a']}:{row['b']}",
            Context(row["prompt"], tuple(json.loads(row["images"])), turns_after_task(row["history"])),
            CandidateView(row["a_text"], row["a_seen"], tuple(json.loads(row["a_images"]))),
            CandidateView(row["b_text"], row["b_seen"], tuple(json.loads(row["b_images"]))),
            row["better"],
        )
        for row in rows
    }
    return list(found.values())


def turns_after_task(history: str) -> tuple[Message, ...]:
    """What came after the task's own message in a recorded conversation."""
    messages = messages_from_json(history)
    asked = next((at for at, message in enumerate(messages) if message.role == "user"), -1)
    return messages[asked + 1 :]


def _read_line(path: Path, number: int, line: str) -> GoldPair:
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("a line must be a JSON object")
        if value.get("better") not in get_args(Better):
            raise ValueError(f"better is {value.get('better')!r}; it must be one of {', '.join(get_args(Better))}")
        pixels = _pixels(path.parent, value.get("images", []))
        history = tuple(_turn(turn) for turn in value.get("history", []))
        context = Context(_text(value, "task"), tuple(pixels), history, pixels)
        return GoldPair(_text(value, "id"), context, _view(value, "a"), _view(value, "b"), value["better"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AppError(f"gold set {path}, line {number}: {error}") from error


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{key} is {text!r}; it must be a text")
    return text


def _view(value: Mapping[str, Any], key: str) -> CandidateView:
    view = value.get(key)
    if not isinstance(view, dict):
        raise ValueError(f"{key} is {view!r}; it must be an object with action and observation")
    return CandidateView(_text(view, "action"), str(view.get("observation", "")))


def _turn(turn: Any) -> Message:
    role, text = turn["role"], turn["text"]
    if role == "assistant":
        return assistant(text)
    if role == "user":
        return user(text)
    if role == "tool":
        return tool_result(ToolCall("", "", "{}"), text)
    raise ValueError(f"a turn of history has role {role!r}; it must be assistant, tool or user")


def _pixels(folder: Path, names: Any) -> dict[str, bytes]:
    found = [(folder / str(name)).read_bytes() for name in names]
    return {hashlib.sha256(data).hexdigest(): data for data in found}
