"""Who runs a tool call: the application's toolbox, the client at the other end of a stream, or both by name.

Owns the executor seam, and that arguments are checked before anything runs. Executors never raise because
of a tool or of what the model wrote: that is an outcome.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nightschool_server.agent.arguments import arguments_fault, schema_fault
from nightschool_server.chat import ToolCall, ToolResult, ToolSpec
from nightschool_server.errors import InvalidRequestError
from nightschool_server.tools.call import truncate, unknown_tool
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import DEFAULT_LIMITS, ToolFailure, ToolOutcome

DEFAULT_CLIENT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ClientAnswer:
    """What a client gave back for a call."""

    result: ToolResult
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes of the result's images, by sha256."""


ClientCallback = Callable[[ToolCall], Awaitable[ClientAnswer]]
"""Sends a call to the client and waits for its result; cancelled at the deadline."""


class ToolExecutor(Protocol):
    """Runs tool calls."""

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """What the model may call."""
        ...

    def is_read_only(self, name: str) -> bool:
        """Whether the tool of that name says that it changes nothing, so that calls may run side by side."""
        ...

    async def run(self, call: ToolCall, state: ToolState, *, max_s: float = math.inf) -> ToolOutcome:
        """Check and run one call on `state`, for at most `max_s`. An error is an outcome; only cancellation raises."""
        ...


class ClientExecutor:
    """Tools that the client brought and runs itself."""

    def __init__(
        self,
        tools: Sequence[ToolSpec],
        callback: ClientCallback,
        *,
        timeout_s: float = DEFAULT_CLIENT_TIMEOUT_S,
        max_output_chars: int = DEFAULT_LIMITS.max_output_chars,
    ) -> None:
        """Raises InvalidRequestError for a schema that is wrong or a name that comes twice."""
        for index, spec in enumerate(tools):
            if fault := schema_fault(spec.parameters):
                field = f"start.client_tools[{index}].parameters_json"
                raise InvalidRequestError(field, f"the schema of tool {spec.name!r} is wrong: {fault}")
        _check_names([("the client", spec) for spec in tools])
        self._tools = {spec.name: spec for spec in tools}
        self._callback = callback
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return tuple(self._tools.values())

    def is_read_only(self, name: str) -> bool:
        return False  # A client says nothing of effects, and answers one call at a time.

    async def run(self, call: ToolCall, state: ToolState, *, max_s: float = math.inf) -> ToolOutcome:
        spec = self._tools.get(call.name)
        if spec is None:
            return unknown(call, self.tools, state)
        if fault := arguments_fault(spec.parameters, json.loads(call.arguments)):
            return failed("schema", fault, state)
        started, timeout_s = time.perf_counter(), min(self._timeout_s, max_s)
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                answer = await self._callback(call)
        except TimeoutError:
            if not deadline.expired():
                raise
            fault = f"the client did not answer within {timeout_s:.3g} s"
            return failed("timeout", fault, state, time.perf_counter() - started)
        content = truncate(answer.result.content, self._max_output_chars)
        failure: ToolFailure = "execution" if answer.result.is_error else ""
        seconds = time.perf_counter() - started
        return ToolOutcome(content, answer.result.is_error, failure, state, seconds, answer.images)


class RoutingExecutor:
    """Several executors as one, by the tool's name."""

    def __init__(self, application: ToolExecutor, client: ToolExecutor, order: Sequence[str] = ()) -> None:
        """`order` is `App.tool_order`. Raises InvalidRequestError where both bring a tool of the same name."""
        named = [(where, spec) for where, e in _places(application, client) for spec in e.tools]
        _check_names(named)
        self.tools: tuple[ToolSpec, ...] = in_order([spec for _, spec in named], order)
        self._by_name = {spec.name: e for _, e in _places(application, client) for spec in e.tools}

    def is_read_only(self, name: str) -> bool:
        executor = self._by_name.get(name)
        return executor is not None and executor.is_read_only(name)

    async def run(self, call: ToolCall, state: ToolState, *, max_s: float = math.inf) -> ToolOutcome:
        executor = self._by_name.get(call.name)
        return unknown(call, self.tools, state) if executor is None else await executor.run(call, state, max_s=max_s)


def in_order(tools: Sequence[ToolSpec], order: Sequence[str]) -> tuple[ToolSpec, ...]:
    """The tools that `order` names, as it names them, then the others as they come."""
    places = {name: place for place, name in enumerate(order)}
    return tuple(sorted(tools, key=lambda spec: places.get(spec.name, len(places))))


def _places(application: ToolExecutor, client: ToolExecutor) -> tuple[tuple[str, ToolExecutor], ...]:
    return ("the application", application), ("the client", client)


def _check_names(named: Sequence[tuple[str, ToolSpec]]) -> None:
    seen: dict[str, str] = {}
    for where, spec in named:
        if spec.name in seen:
            message = f"tool {spec.name!r} comes from {seen[spec.name]} and from {where}: rename one"
            raise InvalidRequestError("start.client_tools", message)
        seen[spec.name] = where


def unknown(call: ToolCall, tools: Sequence[ToolSpec], state: ToolState) -> ToolOutcome:
    """The outcome of a call of a name that no tool has."""
    return failed("unknown_tool", unknown_tool(call.name, [spec.name for spec in tools]), state)


def failed(failure: ToolFailure, fault: str, state: ToolState, duration_s: float = 0.0) -> ToolOutcome:
    """The outcome of a call that went wrong: `fault` is what the model is told."""
    return ToolOutcome(f"error: {fault}", True, failure, state, duration_s)
