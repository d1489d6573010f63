"""Requests as they come off the wire, checked field by field and turned into the server's frozen types.

Every violation is an InvalidRequestError that names the field's path (`messages[2].parts[0].image`), the
value, the rule and the remedy. Owns messages and the envelope that the three model calls share; tools are
`wire_tools.py`'s, sampling is `wire_sampling.py`'s, images are `wire_images.py`'s, files are `wire_files.py`'s,
replies are `wire_replies.py`'s.
Whether an adapter exists or a prompt fits is decided by those who know: the registry and the engine.

Hashing image bytes and checking what can be guided take time: call `generate_call` and `task_call` off the event loop
when `takes_time` says so.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool_server import chat
from nightschool_server.agent import toolcalls
from nightschool_server.engine import LIVE_PRIORITY, PRACTICE_PRIORITY, Sampling, ToolChoice
from nightschool_server.errors import InvalidRequestError
from nightschool_server.image_check import DEFAULT_LIMITS, ImageLimits
from nightschool_server.service.task_limits import NOTHING_ASKED, AskedLimits, asked_limits
from nightschool_server.service.wire_files import SentFile
from nightschool_server.service.wire_images import ImageParts
from nightschool_server.service.wire_sampling import sampling_of
from nightschool_server.service.wire_tools import json_of, tool_choice_of, tools_of

Policy = Literal["train", "log_only", "no_log"]

MAX_ID_CHARS = 200
MAX_TEXT_CHARS = 65_536

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
    images: ImageParts
    adapter: str
    """Empty: the router chooses."""
    session_id: str
    request_id: str
    policy: Policy | None
    """None: the server's default."""
    priority: int
    tool_choice: ToolChoice
    digest: str
    """sha256 over the request without its request_id: the same id must come with the same digest."""
    files: tuple[SentFile, ...] = ()
    """Of RunTask."""
    limits: AskedLimits = NOTHING_ASKED
    """Of RunTask."""


def takes_time(messages: Sequence[content_pb2.Message], tools: Sequence[content_pb2.Tool]) -> bool:
    """Whether reading these means hashing and checking image bytes, or trying to guide a schema."""
    if any(tool.strict for tool in tools):
        return True
    return any(has_image_bytes(part) for message in messages for part in message.parts)


def has_image_bytes(part: content_pb2.Part) -> bool:
    """Whether the part, or the tool result in it, brings the bytes of an image."""
    return bool(part.image.data) or any(image.data for image in part.tool_result.images)


def generate_call(request: agent_pb2.GenerateRequest, limits: ImageLimits = DEFAULT_LIMITS) -> ModelCall:
    """The call that a GenerateRequest asks for."""
    images = ImageParts(limits)
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
        tool_choice=tool_choice_of(request.tool_choice, request.tools),
        digest=_digest(request),
    )


def task_call(start: agent_pb2.TaskStart, defaults: Sampling, limits: ImageLimits = DEFAULT_LIMITS) -> ModelCall:
    """The call that a TaskStart asks for; `tools` are the client's own, `defaults` what an absent field takes."""
    try:
        return _task_call(start, defaults, limits)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"start.{error.field}", f"start.{error}") from None


def _task_call(start: agent_pb2.TaskStart, defaults: Sampling, limits: ImageLimits) -> ModelCall:
    images = ImageParts(limits)
    sampling = sampling_of(start.sampling, defaults)
    if sampling.n != 1:
        _refuse("sampling.n", f"{sampling.n}, but a task has one answer: leave it out")
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
        limits=asked_limits(start),
        tool_choice="auto",
        digest=_digest(start),
    )


def policy_of(value: int) -> Policy | None:
    """The learning policy, None where the caller leaves it to the server."""
    if value not in POLICIES:
        _refuse("learning_policy", f"{value}, which is none of TRAIN, LOG_ONLY and NO_LOG")
    return POLICIES[value]


def _messages(messages: Sequence[content_pb2.Message], images: ImageParts) -> tuple[chat.Message, ...]:
    """The conversation; what its image parts hold is gathered in `images`."""
    if not messages:
        _refuse("messages", "empty: send at least one message")
    return tuple(_message(message, f"messages[{index}]", images) for index, message in enumerate(messages))


def _message(message: content_pb2.Message, field: str, images: ImageParts) -> chat.Message:
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


def _part(part: content_pb2.Part, role: chat.Role, field: str, images: ImageParts) -> chat.Part:
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
    return tool_result(part.tool_result, f"{field}.tool_result", images)


def _tool_call(call: content_pb2.ToolCall, field: str) -> chat.ToolCall:
    if not call.name:
        _refuse(f"{field}.name", "empty: name the tool that was called")
    arguments = call.arguments_json or "{}"
    try:
        value = json_of(arguments)
    except ValueError as error:
        _refuse(f"{field}.arguments_json", f"not JSON ({error}): send a JSON object")
    if not isinstance(value, dict):
        _refuse(f"{field}.arguments_json", "not a JSON object: send the arguments by name")
    return chat.ToolCall(call.id, call.name, arguments)


def tool_result(result: content_pb2.ToolResult, field: str, images: ImageParts) -> chat.ToolResult:
    """What a tool gave back, in a message or in answer to a tool_request; its images are gathered in `images`.

    Only an error may be nameless: it answers a call that could not be read, and the agent loop writes such ones.
    """
    if not result.name and not result.is_error:
        _refuse(f"{field}.name", "empty: name the tool that gave the result")
    hashes = tuple(images.add(image, f"{field}.images[{index}]") for index, image in enumerate(result.images))
    return chat.ToolResult(result.call_id, result.name, result.content, result.is_error, hashes, result.simulated)


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


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequestError(field, f"{field} is {problem}")
