"""Stored messages as the turns that a report shows."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nightschool_server import chat

from nightschool_learner.report.contents import MAX_CHARS, Said

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Characters that show nothing, turn the direction of what follows, or belong into no file."""


def shown(text: str) -> str:
    """A text as a report may hold it: cut, and with its invisible characters written out."""
    left_out = len(text) - MAX_CHARS
    cut = text if left_out <= 0 else f"{text[:MAX_CHARS]}... ({left_out:,} more characters)"
    return _UNSEEN.sub(lambda match: f"\\u{ord(match.group()):04x}", cut.replace("\r\n", "\n"))


def turns_of(messages: Iterable[chat.Message]) -> tuple[Said, ...]:
    """Everything but what the system was told."""
    return tuple(
        Said(message.role, shown(_text_of(message)), message.images) for message in messages if message.role != "system"
    )


def turns_of_json(history: str) -> tuple[Said, ...]:
    """The turns of a stored conversation."""
    return turns_of(chat.messages_from_json(history))


def _text_of(message: chat.Message) -> str:
    lines: list[str] = []
    for part in message.parts:
        if isinstance(part, chat.Text):
            lines.append(part.text)
        elif isinstance(part, chat.File):
            lines.append(part.line.rstrip("\n"))
        elif isinstance(part, chat.ToolCall) and not message.text:  # else the text holds the call as it was written
            lines.append(f"{part.name} {part.arguments}")
        elif isinstance(part, chat.ToolResult):
            lines.append(f"{part.name}: {'ERROR: ' if part.is_error else ''}{part.content}")
    return "\n".join(lines)
