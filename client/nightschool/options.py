"""The keyword options of `generate`, `stream` and `run_task`, and the requests that they make.

An option left out, or None, takes the server's default. Bounds are the server's to check, unknown names
are refused here.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool.content import LearningPolicy, Priority, ToolChoice
from nightschool.errors import InvalidRequestError
from nightschool.files import FileLike
from nightschool.messages import ImageLike, MessagesLike, messages_of
from nightschool.tools import Tool, ToolLike, tools_of

POLICIES: dict[str, content_pb2.LearningPolicy.ValueType] = {
    LearningPolicy.TRAIN: content_pb2.TRAIN,
    LearningPolicy.LOG_ONLY: content_pb2.LOG_ONLY,
    LearningPolicy.NO_LOG: content_pb2.NO_LOG,
}
PRIORITIES: dict[str, content_pb2.Priority.ValueType] = {
    Priority.LIVE: content_pb2.LIVE,
    Priority.PRACTICE: content_pb2.PRACTICE,
}

TOOL_CHOICES: dict[str, content_pb2.ToolChoice.ValueType] = {
    ToolChoice.AUTO: content_pb2.AUTO,
    ToolChoice.REQUIRED: content_pb2.REQUIRED,
}


class CallOptions(TypedDict, total=False):
    """Options of every call of the model."""

    images: Iterable[ImageLike]
    """Put in front of the last user turn: bytes, paths, PIL images."""
    tools: Sequence[ToolLike]
    """Python functions or `Tool`s that the model may call."""
    max_tokens: int | None
    """Tokens of one answer, or of one step."""
    temperature: float | None
    """0 is greedy."""
    top_p: float | None
    top_k: int | None
    """0 keeps every token."""
    seed: int | None
    """The same seed, prompt and adapter give the same answer."""
    stop: Sequence[str]
    """Strings that end the answer without being part of it."""
    adapter: str | None
    """Pins the call to an adapter by name, "base" for none."""
    session_id: str | None
    """Calls of one session keep the adapter that the first of them got."""
    request_id: str | None
    """Idempotency key; one is made where it is left out."""
    learning: LearningPolicy | str | None
    """train, log_only or no_log."""
    timeout_s: float | None


class GenerateOptions(CallOptions, total=False):
    """Options of `generate` and `stream`."""

    n: int | None
    """Answers to sample."""
    logprobs: bool
    """Report the tokens of each answer and their logprobs."""
    top_logprobs: int
    """Likeliest tokens to report at each position; needs `logprobs`."""
    ignore_eos: bool
    """Run to max_tokens whatever the model says; for measurements."""
    tool_choice: ToolChoice | str | None
    """auto, or required: the answer is one or more calls and nothing else."""
    priority: Priority | str | None
    """live or practice; the latter needs the admin scope."""


class TaskOptions(CallOptions, total=False):
    """Options of `run_task`."""

    max_steps: int | None
    """This and the limits below: at most the server's, which is taken where they are left out."""
    max_task_tokens: int | None
    """Of all steps."""
    max_time_s: float | None
    """Wall time; the task ends in order, which `timeout_s` does not let it."""
    max_tool_s: float | None
    """Of all tool calls together."""
    files: Iterable[FileLike]
    """Put into the task's workspace: paths, or `File`s. Large ones are uploaded by themselves."""


def new_request_id() -> str:
    """An idempotency key."""
    return f"req_{secrets.token_hex(12)}"


class ScoreOptions(TypedDict, total=False):
    """Options of `score`."""

    tools: Sequence[ToolLike]
    """Python functions or `Tool`s that the prompt names."""
    adapter: str | None
    """Pins the call to an adapter by name, "base" for none."""
    priority: Priority | str | None
    """live or practice; practice needs the admin scope."""
    timeout_s: float | None


def generate_request(messages: MessagesLike, options: GenerateOptions) -> agent_pb2.GenerateRequest:
    """The request of `Generate` and `StreamGenerate`."""
    _check_names(options, GenerateOptions)
    return agent_pb2.GenerateRequest(
        messages=messages_of(messages, options.get("images", ())),
        tools=[tool.proto() for tool in tools_of(options.get("tools", ()))],
        sampling=_sampling(options),
        adapter=options.get("adapter") or "",
        session_id=options.get("session_id") or "",
        request_id=options.get("request_id") or new_request_id(),
        learning_policy=_chosen(POLICIES, options.get("learning"), "learning"),
        priority=_chosen(PRIORITIES, options.get("priority"), "priority"),
        tool_choice=_chosen(TOOL_CHOICES, options.get("tool_choice"), "tool_choice"),
    )


def score_request(messages: MessagesLike, continuation: str, options: ScoreOptions) -> agent_pb2.ScoreRequest:
    """The request of `Score`."""
    _check_names(options, ScoreOptions)
    return agent_pb2.ScoreRequest(
        messages=messages_of(messages),
        tools=[tool.proto() for tool in tools_of(options.get("tools", ()))],
        continuation=continuation,
        adapter=options.get("adapter") or "",
        priority=_chosen(PRIORITIES, options.get("priority"), "priority"),
    )


def task_request(messages: MessagesLike, options: TaskOptions, tools: Sequence[Tool]) -> agent_pb2.RunTaskRequest:
    """The first request of `RunTask`; `tools` are those of `options`."""
    _check_names(options, TaskOptions)
    start = agent_pb2.TaskStart(
        messages=messages_of(messages, options.get("images", ())),
        client_tools=[tool.proto() for tool in tools],
        sampling=_sampling(options),
        adapter=options.get("adapter") or "",
        session_id=options.get("session_id") or "",
        request_id=options.get("request_id") or new_request_id(),
        learning_policy=_chosen(POLICIES, options.get("learning"), "learning"),
        max_steps=options.get("max_steps") or 0,
        max_task_tokens=options.get("max_task_tokens") or 0,
        max_time_s=options.get("max_time_s") or 0.0,
        max_tool_s=options.get("max_tool_s") or 0.0,
    )
    return agent_pb2.RunTaskRequest(start=start)


def _sampling(options: Mapping[str, Any]) -> content_pb2.Sampling:
    names = [field.name for field in content_pb2.Sampling.DESCRIPTOR.fields]
    given = {name: options[name] for name in names if options.get(name) is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        return content_pb2.Sampling(**given)
    except (TypeError, ValueError) as error:
        name = next((name for name in given if not _fits(name, given[name])), "sampling")
        raise InvalidRequestError(f"{name} is {given.get(name)!r}, which does not fit: {error}", field=name) from None


def _fits(name: str, value: Any) -> bool:
    try:
        content_pb2.Sampling(**{name: value})
    except (TypeError, ValueError):
        return False
    return True


def _chosen(table: Mapping[str, Any], name: str | None, field: str) -> Any:
    if name is None or name == "unspecified":
        return None
    if name not in table:
        raise InvalidRequestError(f"{field} is {name!r}, but must be one of {', '.join(table)}", field=field)
    return table[name]


def _check_names(options: Mapping[str, Any], known: Any) -> None:
    """Raises TypeError, as Python does for any other unknown keyword, with the nearest right one."""
    names = known.__optional_keys__
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(names))}"
            raise TypeError(f"unknown option {name!r}: {hint}")
