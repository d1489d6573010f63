"""Protos to this package's frozen types and those to JSON, by field name.

A type's fields are a subset of its message's fields under the same names (a test compares them), so one function
reads them all. Enum values lose their case, an unknown one of a newer server reads as "unspecified"; an absent
message or timestamp reads as None.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import typing
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from types import UnionType
from typing import Any, TypeVar, cast

from google.protobuf.message import Message as ProtoMessage
from nightschool_proto.v1 import content_pb2

from nightschool.content import Image, Message, Part, Role, Text, ToolCall, ToolResult

T = TypeVar("T")


def from_proto(cls: type[T], message: ProtoMessage) -> T:
    """The frozen dataclass `cls` with what `message` holds."""
    if cls is Message:
        assert isinstance(message, content_pb2.Message)
        return cast("T", message_of(message))
    return cls(**{name: _value(hint, message, name) for name, hint in _hints(cast("Any", cls)).items()})


def message_of(message: content_pb2.Message) -> Message:
    """One turn; parts of a kind that this client does not know are left out."""
    parts = tuple(part for part in map(_part_of, message.parts) if part is not None)
    return Message(enum_member(Role, message, "role"), parts)


def to_json(value: Any) -> Any:
    """What `json.dumps` takes: dataclasses as objects, times in ISO 8601, bytes in base64."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _value(hint: Any, message: ProtoMessage, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is UnionType:
        return _value(args[0], message, name) if message.HasField(name) else None
    value = getattr(message, name)
    if origin is tuple:
        return tuple(_item(args[0], item) for item in value)
    if origin is Mapping:
        return dict(value)
    if hint is datetime:
        return value.ToDatetime(tzinfo=UTC)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return enum_member(hint, message, name)
    return _item(hint, value)


def _item(hint: Any, value: Any) -> Any:
    return from_proto(hint, value) if isinstance(value, ProtoMessage) else value


E = TypeVar("E", bound=StrEnum)


def enum_member(cls: type[E], message: ProtoMessage, name: str) -> E:
    """The member of `cls` that the enum field `name` holds; "unspecified" for one that this client does not know."""
    kind = message.DESCRIPTOR.fields_by_name[name].enum_type
    found = kind.values_by_number.get(getattr(message, name)) if kind is not None else None
    try:
        return cls(found.name.lower() if found is not None and found.number else "unspecified")
    except ValueError:
        return cls("unspecified")


def _part_of(part: content_pb2.Part) -> Part | None:
    kind = part.WhichOneof("part")
    if kind == "text":
        return Text(part.text)
    if kind == "image":
        return from_proto(Image, part.image)
    if kind == "tool_call":
        return from_proto(ToolCall, part.tool_call)
    if kind == "tool_result":
        return from_proto(ToolResult, part.tool_result)
    return None
