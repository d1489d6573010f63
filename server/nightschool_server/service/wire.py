"""Requests as they come off the wire, checked field by field and turned into the server's frozen types.

Every violation is an InvalidRequestError that names the field's path (`messages[2].parts[0].image`), the
value, the rule and the remedy. Owns messages, tools and the envelope that the three model calls share;
sampling is `wire_sampling.py`'s, images are `wire_images.py`'s, replies are `wire_replies.py`'s. Whether an
adapter exists or a prompt fits is decided by those who know: the registry and the engine.

Hashing and checking image bytes takes time: call `generate_call` and `task_call` off the event loop when
`has_image_bytes` says so.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import jsonschema
from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool_server import chat
from nightschool_server.agent import toolcalls
from nightschool_server.engine import LIVE_PRIORITY, PRACTICE_PRIORITY, Sampling
from nightschool_server.errors import InvalidRequestError
from nightschool_server.service import wire_images
from nightschool_server.service.wire_sampling import sampling_of

Policy = Literal["train", "log_only", "no_log"]

MAX_ID_CHARS = 200
MAX_SCHEMA_CHARS = 65_536
MAX_TEXT_CHARS = 65_536
MAX_TOOLS = 128

POLICIES: dict[int, Policy | None] = {
    content_pb2.LEARNING_POLICY_UNSPECIFIED: None,
    content_pb2.TRAIN: "train",
    content_pb2.LOG_ONLY: "log_only",
    content_pb2.NO_LOG: "no_log",
}

ROLES: dict[int, chat.Role] = {
    content_pb2.Message.SYSTEM: "system",
    content_pb2.Message.USER: "user",
    content_pb2.Message.ASSISTANT: "assistant",
    content_pb2.Message.TOOL: "tool",
}


@dataclass(frozen=True)
class ModelCall:
    """What Generate, StreamGenerate and RunTask ask for, checked."""

    messages: tuple[chat.Message, ...]
    tools: tuple[chat.ToolSpec, ...]
    sampling: Sampling
    images: wire_images.ImageParts
    adapter: str
    """Empty: the router chooses."""
    session_id: str
    request_id: str
    policy: Policy | None
    """None: the server's default."""
    priority: int
    max_steps: int
    """Of RunTask; 0 takes the server's limit."""
    digest: str
    """sha256 over the request without its request_id: the same id must come with the same digest."""


def has_image_bytes(messages: Sequence[content_pb2.Message]) -> bool:
    """Whether reading these messages means hashing and checking image bytes."""
    return any(part.image.data for message in messages for part in message.parts if part.HasField("image"))


def generate_call(
    request: agent_pb2.GenerateRequest, limits: wire_images.ImageLimits = wire_images.DEFAULT_LIMITS
) -> ModelCall:
    """The call that a GenerateRequest asks for."""
    images = wire_images.ImageParts(limits)
    return ModelCall(
        messages=_messages(request.messages, images),
        tools=tools_of(request.tools, "tools"),
        sampling=sampling_of(request.sampling),
        images=images,
        adapter=identifier(request.adapter, "adapter"),
        session_id=identifier(request.session_id, "session_id"),
        request_id=identifier(request.request_id, "request_id"),
        policy=policy_of(request.learning_policy),
        priority=_priority(request.priority),
        max_steps=0,
        digest=_digest(request),
    )


def task_call(
    start: agent_pb2.TaskStart, defaults: Sampling, limits: wire_images.ImageLimits = wire_images.DEFAULT_LIMITS
) -> ModelCall:
    """The call that a TaskStart asks for; `tools` are the client's own, `defaults` what an absent field takes."""
    try:
        return _task_call(start, defaults, limits)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"start.{error.field}", f"start.{error}") from None


def _task_call(start: agent_pb2.TaskStart, defaults: Sampling, limits: wire_images.ImageLimits) -> ModelCall:
    images = wire_images.ImageParts(limits)
    sampling = sampling_of(start.sampling, defaults)
    if sampling.n != 1:
        _refuse("sampling.n", f"{sampling.n}, but a task has one answer: leave it out")
    if start.max_steps < 0:
        _refuse("max_steps", f"{start.max_steps}, but must be at least 0: 0 takes the server's limit")
    return ModelCall(
        messages=_messages(start.messages, images),
        tools=tools_of(start.client_tools, "client_tools"),
        sampling=sampling,
        images=images,
        adapter=identifier(start.adapter, "adapter"),
        session_id=identifier(start.session_id, "session_id"),
        request_id=identifier(start.request_id, "request_id"),
        policy=policy_of(start.learning_policy),
        priority=LIVE_PRIORITY,
        max_steps=start.max_steps,
        digest=_digest(start),
    )


def policy_of(value: int) -> Policy | None:
    """The learning policy, None where the caller leaves it to the server."""
    if value not in POLICIES:
        _refuse("learning_policy", f"{value}, which is none of TRAIN, LOG_ONLY and NO_LOG")
    return POLICIES[value]


def tools_of(tools: Sequence[content_pb2.Tool], field: str) -> tuple[chat.ToolSpec, ...]:
    """The tools, each with a name of its own and a JSON Schema of type object."""
    if len(tools) > MAX_TOOLS:
        _refuse(field, f"{len(tools)} tools, but at most {MAX_TOOLS} are taken: send those that the task needs")
    seen: dict[str, int] = {}
    for index, tool in enumerate(tools):
        if not tool.name.strip():
            _refuse(f"{field}[{index}].name", "empty: a tool needs a name that the model can write")
        if tool.name in seen:
            first = f"{field}[{seen[tool.name]}]"
            _refuse(f"{field}[{index}].name", f"{tool.name!r}, which {first} has already: give each tool its own name")
        seen[tool.name] = index
    return tuple(
        chat.ToolSpec(tool.name, tool.description, _schema(tool.parameters_json, f"{field}[{index}].parameters_json"))
        for index, tool in enumerate(tools)
    )


def _schema(text: str, field: str) -> str:
    """The canonical text of a tool's JSON Schema; empty means no arguments."""
    if len(text) > MAX_SCHEMA_CHARS:
        _refuse(field, f"{len(text)} characters long, but a schema may have at most {MAX_SCHEMA_CHARS}: shorten it")
    try:
        return _checked_schema(text)
    except ValueError as error:
        _refuse(field, str(error))


@functools.lru_cache(maxsize=1024)
def _checked_schema(text: str) -> str:
    """Checking a schema takes milliseconds and callers repeat their tools: checked once for each text."""
    if not text:
        return chat.canonical_json({"type": "object", "properties": {}})
    shown = text if len(text) <= 80 else text[:80] + "..."
    try:
        schema = _loads(text)
    except ValueError as error:
        raise ValueError(f"{shown!r}, which is not JSON ({error}): send a JSON Schema of type object") from None
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ValueError(f'{shown!r}, but a tool\'s schema must be an object with "type": "object"')
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = "/".join(str(step) for step in error.absolute_path) or "its root"
        raise ValueError(f"not a JSON Schema: at {where}: {error.message[:200]}") from None
    return chat.canonical_json(schema)


def _messages(messages: Sequence[content_pb2.Message], images: wire_images.ImageParts) -> tuple[chat.Message, ...]:
    """The conversation; what its image parts hold is gathered in `images`."""
    if not messages:
        _refuse("messages", "empty: send at least one message")
    return tuple(_message(message, f"messages[{index}]", images) for index, message in enumerate(messages))


def _message(message: content_pb2.Message, field: str, images: wire_images.ImageParts) -> chat.Message:
    role = ROLES.get(message.role)
    if role is None:
        _refuse(f"{field}.role", f"{message.role}, which is none of SYSTEM (1), USER (2), ASSISTANT (3) and TOOL (4)")
    if not message.parts:
        _refuse(f"{field}.parts", "empty: send at least one part")
    parts = tuple(_part(part, role, f"{field}.parts[{index}]", images) for index, part in enumerate(message.parts))
    checked = chat.Message(role, parts)
    if any(isinstance(part, chat.ToolCall) for part in parts) and toolcalls.OPEN in checked.text:
        _refuse(
            f"{field}.parts",
            f"both {toolcalls.OPEN} markup in a text and tool_call parts, which would put the call into the prompt "
            "twice: send the answer's text verbatim or the tool_call parts",
        )
    return checked


_PARTS_OF: dict[chat.Role, tuple[str, ...]] = {
    "system": ("text",),
    "user": ("text", "image"),
    "assistant": ("text", "tool_call"),
    "tool": ("tool_result",),
}


def _part(part: content_pb2.Part, role: chat.Role, field: str, images: wire_images.ImageParts) -> chat.Part:
    kind = part.WhichOneof("part")
    if kind is None:
        _refuse(field, "empty: set one of text, image, tool_call and tool_result")
    if kind not in _PARTS_OF[role]:
        takes = " or ".join(_PARTS_OF[role])
        _refuse(f"{field}.{kind}", f"of no use in a message of role {role}: it takes {takes}")
    if kind == "text":
        return chat.Text(part.text)
    if kind == "image":
        return chat.Image(images.add(part.image, f"{field}.image"))
    if kind == "tool_call":
        return _tool_call(part.tool_call, f"{field}.tool_call")
    return tool_result(part.tool_result, f"{field}.tool_result")


def _tool_call(call: content_pb2.ToolCall, field: str) -> chat.ToolCall:
    if not call.name:
        _refuse(f"{field}.name", "empty: name the tool that was called")
    arguments = call.arguments_json or "{}"
    try:
        value = _loads(arguments)
    except ValueError as error:
        _refuse(f"{field}.arguments_json", f"not JSON ({error}): send a JSON object")
    if not isinstance(value, dict):
        _refuse(f"{field}.arguments_json", "not a JSON object: send the arguments by name")
    return chat.ToolCall(call.id, call.name, arguments)


def tool_result(result: content_pb2.ToolResult, field: str) -> chat.ToolResult:
    """What a tool gave back, in a message or in answer to a tool_request.

    Only an error may be nameless: it answers a call that could not be read, and the agent loop writes such ones.
    """
    if not result.name and not result.is_error:
        _refuse(f"{field}.name", "empty: name the tool that gave the result")
    return chat.ToolResult(result.call_id, result.name, result.content, result.is_error)


def identifier(value: str, field: str) -> str:
    """A short printable identifier; empty where there is none."""
    if len(value) > MAX_ID_CHARS:
        _refuse(field, f"{len(value)} characters long, but may have at most {MAX_ID_CHARS}")
    if value and not value.isprintable():
        _refuse(field, f"{value!r}, but may hold printable characters only")
    return value


def bounded(text: str, field: str) -> str:
    """Free text of a size that a row may have."""
    if len(text) > MAX_TEXT_CHARS:
        _refuse(field, f"{len(text)} characters long, but may have at most {MAX_TEXT_CHARS}: shorten it")
    return text


def _priority(value: int) -> int:
    if value not in content_pb2.Priority.values():
        _refuse("priority", f"{value}, which is none of LIVE and PRACTICE")
    return PRACTICE_PRIORITY if value == content_pb2.PRACTICE else LIVE_PRIORITY


def _digest(request: agent_pb2.GenerateRequest | agent_pb2.TaskStart) -> str:
    plain = copy.copy(request)
    plain.ClearField("request_id")
    return hashlib.sha256(plain.SerializeToString(deterministic=True)).hexdigest()


def _loads(text: str) -> Any:
    """JSON without the NaN and Infinity that Python's reader takes."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequestError(field, f"{field} is {problem}")
