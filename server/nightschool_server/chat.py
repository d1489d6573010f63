"""The conversation as the server holds it: messages, their parts, and tool specifications.

Owns the frozen types that engines, the agent runtime, the store and the learner exchange, and their
two text forms: the dictionaries that a Hugging Face chat template reads, and canonical JSON for the
store. Does not own the wire (see `service/wire.py`) nor how a model writes a tool call (see `agent/toolcalls.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

_MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")
UNSEEN_IMAGE = "[image, not shown: this model reads text only]"

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
class File:
    """A file of the task's workspace, as it was when it was sent or given back; the model sees a line of it."""

    name: str
    """Its path in the workspace, one name without a folder."""
    media_type: str
    size_bytes: int
    sha256: str

    @property
    def line(self) -> str:
        """What the model is told, with the line's end."""
        return f"[file: {self.name}, {self.media_type}, {self.size_bytes:,} bytes]\n"


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
    files: tuple[File, ...] = ()
    """That the tool gave back; the content has a line of each."""


Part = Text | Image | File | ToolCall | ToolResult


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
    def files(self) -> tuple[File, ...]:
        """Every file, those that tools gave back included, in order."""
        return tuple(file for part in self.parts for file in _files_of(part))

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


def user(text: str, images: Sequence[str] = (), files: Sequence[File] = ()) -> Message:
    """A user message: the images (by sha256) first, then the files, then the text."""
    return Message("user", (*(Image(sha256) for sha256 in images), *files, Text(text)))


def assistant(text: str) -> Message:
    """An assistant message, its text verbatim."""
    return Message("assistant", (Text(text),))


def tool_result(
    call: ToolCall,
    content: str,
    *,
    is_error: bool = False,
    images: Sequence[str] = (),
    simulated: bool = False,
    files: Sequence[File] = (),
) -> Message:
    """The observation that answers `call`; `images` by sha256."""
    result = ToolResult(call.id, call.name, content, is_error, tuple(images), simulated, tuple(files))
    return Message("tool", (result,))


def num_simulated(messages: Sequence[Message]) -> int:
    """How many observations of the conversation a simulator gave."""
    return sum(isinstance(part, ToolResult) and part.simulated for message in messages for part in message.parts)


def text_only(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages as a model without eyes reads them: a tool's image is a line of its result's text."""
    return tuple(replace(message, parts=tuple(_text_of_result(part) for part in message.parts)) for message in messages)


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template reads them.

    A user message or a tool result with images has a content list of `{"type": "image"}` and `{"type": "text"}`;
    a file of a user message is a line of its text;
    every other content is a string, which is what templates of text models expect. Tool calls that
    arrived as parts become `tool_calls`; a tool result becomes a message of role `tool`.
    """
    rendered: list[dict[str, Any]] = []
    for message in messages:
        calls = [part for part in message.parts if isinstance(part, ToolCall)]
        results = [part for part in message.parts if isinstance(part, ToolResult)]
        if results:
            rendered.extend(
                {"role": "tool", "name": r.name, "content": _result_content(r), **_shown_id("tool_call_id", r.call_id)}
                for r in results
            )
            continue
        entry: dict[str, Any] = {"role": message.role, "content": _template_content(message)}
        if calls:
            entry["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": c.name, "arguments": json.loads(c.arguments)},
                    **_shown_id("id", c.id),
                }
                for c in calls
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
        return "".join(_shown(part) for part in message.parts)
    content: list[dict[str, str]] = []
    for part in message.parts:
        if isinstance(part, Image):
            content.append({"type": "image"})
        elif isinstance(part, Text | File):
            content.append({"type": "text", "text": _shown(part)})
    return content


def _shown(part: Part) -> str:
    match part:
        case Text(text):
            return text
        case File():
            return part.line
        case _:
            return ""


def _shown_id(key: str, call_id: str) -> dict[str, str]:
    """Mistral's templates ask for ids, of nine letters and digits; no other one is shown any."""
    return {key: call_id} if _MISTRAL_ID.fullmatch(call_id) else {}


def _text_of_result(part: Part) -> Part:
    if not isinstance(part, ToolResult) or not part.images:
        return part
    return replace(part, content="\n".join([UNSEEN_IMAGE] * len(part.images) + [part.content]), images=())


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


def _files_of(part: Part) -> tuple[File, ...]:
    match part:
        case File():
            return (part,)
        case ToolResult():
            return part.files
        case _:
            return ()


def _part_to_dict(part: Part) -> dict[str, Any]:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Image(sha256):
            return {"type": "image", "sha256": sha256}
        case File():
            return {"type": "file", **file_to_dict(part)}
        case ToolCall(id_, name, arguments):
            return {"type": "tool_call", "id": id_, "name": name, "arguments": arguments}
        case ToolResult(call_id, name, content, is_error):
            kept = {"type": "tool_result", "call_id": call_id, "name": name, "content": content, "is_error": is_error}
            return {**kept, **_rare_of(part)}


def _rare_of(result: ToolResult) -> dict[str, Any]:
    """What few results have; rows of older versions never do."""
    rare = {
        "images": list(result.images),
        "simulated": result.simulated,
        "files": [file_to_dict(file) for file in result.files],
    }
    return {name: value for name, value in rare.items() if value}


def file_to_dict(file: File) -> dict[str, Any]:
    """The file as JSON holds it; `file_from_dict` reads it."""
    return {"name": file.name, "media_type": file.media_type, "size_bytes": file.size_bytes, "sha256": file.sha256}


def file_from_dict(value: Mapping[str, Any]) -> File:
    """The file that `file_to_dict` wrote."""
    return File(value["name"], value["media_type"], value["size_bytes"], value["sha256"])


def _part_from_dict(value: Mapping[str, Any]) -> Part:
    match value["type"]:
        case "text":
            return Text(value["text"])
        case "image":
            return Image(value["sha256"])
        case "file":
            return file_from_dict(value)
        case "tool_call":
            return ToolCall(value["id"], value["name"], value["arguments"])
        case "tool_result":
            return ToolResult(
                value["call_id"],
                value["name"],
                value["content"],
                value["is_error"],
                tuple(value.get("images", ())),
                value.get("simulated", False),
                tuple(file_from_dict(file) for file in value.get("files", ())),
            )
        case other:
            raise ValueError(f"unknown part type {other!r}")
