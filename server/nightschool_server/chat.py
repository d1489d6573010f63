"""The conversation as the server holds it: messages, their parts, and tool specifications.

Owns the frozen types that engines, the agent runtime, the store and the learner exchange, and their
two text forms: the dictionaries that a Hugging Face chat template reads, and canonical JSON for the
store. Does not own the wire (see `service/wire.py`) nor how a model writes a tool call (see `agent/toolcalls.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Text:
    """Plain text. An assistant's text is kept verbatim, tool-call markup included, so that the
    tokens rendered for history and for training are those that were sampled."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image by the content hash of its encoded bytes; the bytes live in the blob store."""

    sha256: str


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asked for. `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolResult:
    """What a tool gave back; an error is an observation like any other."""

    call_id: str
    name: str
    content: str
    is_error: bool = False
    images: tuple[str, ...] = ()
    """By the content hash of their encoded bytes; the model sees them in front of the content."""
    simulated: bool = False
    """Whether a simulator answered in the tool's place, as it does in practice for external tools."""


Part = Text | Image | ToolCall | ToolResult


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> tuple[str, ...]:
        """The sha256 of every image, those that tools gave back included, in order."""
        return tuple(sha256 for part in self.parts for sha256 in _images_of(part))


@dataclass(frozen=True)
class ToolSpec:
    """A tool as the model sees it. `parameters` is a JSON Schema object as canonical JSON text."""

    name: str
    description: str
    parameters: str
    strict: bool = False
    """Whether a call's arguments are held to the schema while they are sampled; the model's prompt does not say it."""

    @property
    def schema(self) -> Any:
        """The parsed JSON Schema."""
        return json.loads(self.parameters)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the form that is hashed and stored."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def system(text: str) -> Message:
    """A system message."""
    return Message("system", (Text(text),))


def user(text: str, images: Sequence[str] = ()) -> Message:
    """A user message: the images (by sha256) first, then the text."""
    return Message("user", (*(Image(sha256) for sha256 in images), Text(text)))


def assistant(text: str) -> Message:
    """An assistant message, its text verbatim."""
    return Message("assistant", (Text(text),))


def tool_result(
    call: ToolCall, content: str, *, is_error: bool = False, images: Sequence[str] = (), simulated: bool = False
) -> Message:
    """The observation that answers `call`; `images` by sha256."""
    return Message("tool", (ToolResult(call.id, call.name, content, is_error, tuple(images), simulated),))


def num_simulated(messages: Sequence[Message]) -> int:
    """How many observations of the conversation a simulator gave."""
    return sum(isinstance(part, ToolResult) and part.simulated for message in messages for part in message.parts)


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template reads them.

    A user message or a tool result with images has a content list of `{"type": "image"}` and `{"type": "text"}`;
    every other content is a string, which is what templates of text models expect. Tool calls that
    arrived as parts become `tool_calls`; a tool result becomes a message of role `tool`.
    """
    rendered: list[dict[str, Any]] = []
    for message in messages:
        calls = [part for part in message.parts if isinstance(part, ToolCall)]
        results = [part for part in message.parts if isinstance(part, ToolResult)]
        if results:
            rendered.extend({"role": "tool", "name": r.name, "content": _result_content(r)} for r in results)
            continue
        entry: dict[str, Any] = {"role": message.role, "content": _template_content(message)}
        if calls:
            entry["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}} for c in calls
            ]
        rendered.append(entry)
    return rendered


def template_tools(tools: Sequence[ToolSpec]) -> list[dict[str, Any]] | None:
    """The tools as a chat template reads them, or None where there is none."""
    if not tools:
        return None
    return [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.schema}}
        for t in tools
    ]


def messages_to_json(messages: Sequence[Message]) -> str:
    """Canonical JSON of a conversation; `messages_from_json` is its inverse."""
    return canonical_json([{"role": m.role, "parts": [_part_to_dict(p) for p in m.parts]} for m in messages])


def messages_from_json(text: str) -> tuple[Message, ...]:
    """The conversation that `messages_to_json` wrote."""
    return tuple(Message(m["role"], tuple(_part_from_dict(p) for p in m["parts"])) for m in json.loads(text))


def _template_content(message: Message) -> str | list[dict[str, str]]:
    if not message.images:
        return message.text
    content: list[dict[str, str]] = []
    for part in message.parts:
        if isinstance(part, Image):
            content.append({"type": "image"})
        elif isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
    return content


def _result_content(result: ToolResult) -> str | list[dict[str, str]]:
    if not result.images:
        return result.content
    return [{"type": "image"} for _ in result.images] + [{"type": "text", "text": result.content}]


def _images_of(part: Part) -> tuple[str, ...]:
    match part:
        case Image(sha256):
            return (sha256,)
        case ToolResult():
            return part.images
        case _:
            return ()


def _part_to_dict(part: Part) -> dict[str, Any]:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Image(sha256):
            return {"type": "image", "sha256": sha256}
        case ToolCall(id_, name, arguments):
            return {"type": "tool_call", "id": id_, "name": name, "arguments": arguments}
        case ToolResult(call_id, name, content, is_error, images, simulated):
            kept = {"type": "tool_result", "call_id": call_id, "name": name, "content": content, "is_error": is_error}
            rare: dict[str, Any] = {"images": list(images)} if images else {}
            return {**kept, **rare, **({"simulated": True} if simulated else {})}


def _part_from_dict(value: Mapping[str, Any]) -> Part:
    match value["type"]:
        case "text":
            return Text(value["text"])
        case "image":
            return Image(value["sha256"])
        case "tool_call":
            return ToolCall(value["id"], value["name"], value["arguments"])
        case "tool_result":
            images, simulated = tuple(value.get("images", ())), value.get("simulated", False)
            return ToolResult(value["call_id"], value["name"], value["content"], value["is_error"], images, simulated)
        case other:
            raise ValueError(f"unknown part type {other!r}")
