"""What a caller may pass as a conversation, and the protos that it becomes.

A conversation is a string (one user turn), a `Message`, a `{"role": ..., "content": ...}` dictionary, or a sequence
of the latter two. Content is a string or a list of parts: strings, part types of `content.py`, or dictionaries with a
"type" of text, image, tool_call or tool_result. An image is bytes, a path, a Pillow image, or an `Image`.
Whether the server likes what it gets is the server's to say; what cannot be read at all is refused here by field.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from nightschool_proto.v1 import content_pb2

from nightschool.content import Image, Message, Part, Role, Text, ToolCall, ToolResult
from nightschool.errors import InvalidRequestError


@runtime_checkable
class Savable(Protocol):
    """A picture that can write itself, such as `PIL.Image.Image`."""

    def save(self, fp: Any, format: str) -> Any:
        """Write the encoded picture into a file."""
        ...


ImageLike: TypeAlias = Image | bytes | os.PathLike[str] | Savable
MessageLike: TypeAlias = Message | Mapping[str, Any]
MessagesLike: TypeAlias = str | MessageLike | Sequence[MessageLike]

ROLES: dict[str, content_pb2.Message.Role.ValueType] = {
    Role.SYSTEM: content_pb2.Message.SYSTEM,
    Role.USER: content_pb2.Message.USER,
    Role.ASSISTANT: content_pb2.Message.ASSISTANT,
    Role.TOOL: content_pb2.Message.TOOL,
}


def messages_of(messages: MessagesLike, images: Iterable[ImageLike] = ()) -> list[content_pb2.Message]:
    """The protos of a conversation; `images` go in front of the last turn's parts, which must be the user's.

    Raises InvalidRequestError with the field for what cannot be read, OSError for an image file that cannot.
    """
    turns: Sequence[MessageLike]
    if isinstance(messages, str):
        turns = [Message(Role.USER, (Text(messages),))]
    elif isinstance(messages, (Message, Mapping)):
        turns = [messages]
    else:
        turns = messages
    protos = [_message(turn, f"messages[{index}]") for index, turn in enumerate(turns)]
    added = [_part(image_of(image, f"images[{index}]")) for index, image in enumerate(images)]
    if added:
        if not protos or protos[-1].role != content_pb2.Message.USER:
            raise _refused("images", "belong to a last turn of the user: put them into the turn that they belong to")
        parts = [*added, *protos[-1].parts]
        protos[-1] = content_pb2.Message(role=content_pb2.Message.USER, parts=parts)
    return protos


def image_of(source: ImageLike, field: str = "image") -> Image:
    """An image part of bytes, a path, a Pillow image or an `Image`."""
    if isinstance(source, Image):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Image(data=bytes(source))
    if isinstance(source, os.PathLike):
        return Image(data=Path(source).read_bytes())
    if isinstance(source, Savable):
        buffer = io.BytesIO()
        source.save(buffer, format="PNG")
        return Image(data=buffer.getvalue())
    raise _refused(field, f"is a {type(source).__name__}, but must be bytes, a pathlib.Path, a PIL image or an Image")


def _message(turn: MessageLike, field: str) -> content_pb2.Message:
    if isinstance(turn, Message):
        role, parts = str(turn.role), list(turn.parts)
    elif isinstance(turn, Mapping):
        role, parts = str(turn.get("role", "")), _parts(turn, field)
    else:
        raise _refused(
            field, f"is a {type(turn).__name__}, but must be a Message or a dictionary with role and content"
        )
    if role not in ROLES:
        raise _refused(f"{field}.role", f"is {role!r}, but must be one of {', '.join(ROLES)}")
    return content_pb2.Message(role=ROLES[role], parts=[_part(part) for part in parts])


def _parts(turn: Mapping[str, Any], field: str) -> list[Part]:
    content = turn.get("content")
    if turn.get("role") == "tool" and isinstance(content, str):
        return [_tool_result(turn)]
    calls: list[Part] = [_tool_call(call) for call in turn.get("tool_calls") or ()]
    if content is None and calls:
        return calls
    if isinstance(content, str):
        return [*([Text(content)] if content or not calls else []), *calls]
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return [*(_part_like(part, f"{field}.content[{index}]") for index, part in enumerate(content)), *calls]
    raise _refused(f"{field}.content", f"is a {type(content).__name__}, but must be a string or a list of parts")


def _part_like(part: Any, field: str) -> Part:
    if isinstance(part, str):
        return Text(part)
    if isinstance(part, (Text, Image, ToolCall, ToolResult)):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image":
        if "sha256" in part:
            return Image(sha256=part["sha256"])
        return image_of(part.get("image", part.get("data")), f"{field}.image")
    if kind == "tool_call":
        return _tool_call(part)
    if kind == "tool_result":
        return _tool_result(part)
    raise _refused(field, 'is no part: write {"type": "text", "text": ...} or {"type": "image", "image": ...}')


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    arguments = call.get("arguments", call.get("arguments_json", "{}"))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(call.get("id", "")), str(call.get("name", "")), text)


def _tool_result(result: Mapping[str, Any]) -> ToolResult:
    call_id = str(result.get("call_id", ""))
    images = tuple(image_of(image, f"images[{i}]") for i, image in enumerate(result.get("images") or ()))
    return ToolResult(
        call_id, str(result.get("name", "")), str(result["content"]), bool(result.get("is_error")), images
    )


def _part(part: Part) -> content_pb2.Part:
    if isinstance(part, Text):
        return content_pb2.Part(text=part.text)
    if isinstance(part, Image):
        return content_pb2.Part(image=image_proto(part))
    if isinstance(part, ToolCall):
        return content_pb2.Part(tool_call=tool_call_proto(part))
    return content_pb2.Part(tool_result=tool_result_proto(part))


def image_proto(image: Image) -> content_pb2.Image:
    """An image for the wire."""
    return content_pb2.Image(sha256=image.sha256) if image.sha256 else content_pb2.Image(data=image.data)


def tool_call_proto(call: ToolCall) -> content_pb2.ToolCall:
    """A tool call for the wire."""
    return content_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)


def tool_result_proto(result: ToolResult) -> content_pb2.ToolResult:
    """A tool result for the wire."""
    return content_pb2.ToolResult(
        call_id=result.call_id,
        name=result.name,
        content=result.content,
        is_error=result.is_error,
        images=[image_proto(image) for image in result.images],
        simulated=result.simulated,
    )


def _refused(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {problem}", field=field, reason="INVALID_REQUEST")
