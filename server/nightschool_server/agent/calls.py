"""The tool calls of one step: in their order, or side by side where they change nothing, and never beyond the limits.

Owns the state that moves from call to call, the events around each and what the model sees of it. Which calls there
are is `loop.py`'s, who runs one is `executors.py`'s. Both a step of tool calls and a program that calls tools
run them here, so that the limits hold for both.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence

from nightschool_server.agent.episode import Event, Failure, Limits, ToolFinished, ToolStarted
from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.chat import Message, ToolCall, ToolResult
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolFailure, ToolOutcome

OnEvent = Callable[[Event], Awaitable[None]]
"""Awaited before the loop goes on, so a slow reader slows its own episode only."""

_FAILURES: Mapping[ToolFailure, Failure] = {
    "": "",
    "parse": "parse",
    "schema": "schema",
    "unknown_tool": "schema",
    "execution": "execution",
    "timeout": "execution",
    "refused": "refused",
}


class StepCalls:
    """Runs the calls of one step; what has come of them so far is in its fields."""

    def __init__(self, executor: ToolExecutor, state: ToolState, limits: Limits, on_event: OnEvent) -> None:
        """`limits.max_tool_s` is what is left of it. Fork `state` first where the step may be dropped."""
        self._executor = executor
        self._before = state
        self._limits = limits
        self._on_event = on_event
        self.state = state
        self.observations: list[Message] = []
        self.images: dict[str, bytes] = {}
        self.failure: Failure = ""
        """Of the first call that failed."""
        self.answer: str | None = None
        """Of the call that ended the task."""
        self.tool_s = 0.0
        """What the calls took, added up."""

    async def run_all(self, calls: Sequence[ToolCall]) -> None:
        """Run the calls of a step. Neighbours that are read_only run side by side; every other one alone.

        When this raises, the workspace that the calls made is gone.
        """
        for aside, group in itertools.groupby(calls, lambda call: self._executor.is_read_only(call.name)):
            neighbours = list(group)
            width = min(self._limits.max_parallel_calls, len(neighbours)) if aside else 1
            if width == 1:
                for call in neighbours:
                    await self.run(call)
            else:
                await self._run_aside(neighbours, width)

    async def run(self, call: ToolCall) -> ToolOutcome:
        """Run one call on the state that the last one left."""
        try:
            await self._on_event(ToolStarted(call))
            outcome = await self._outcome(call)
            self._keep(call, outcome)
            await self._tell(call, outcome)
        except BaseException:
            self._drop(self.state)
            raise
        return outcome

    async def _run_aside(self, calls: Sequence[ToolCall], width: int) -> None:
        """Run calls that change nothing, at most `width` at once. All begin before the first one has ended."""
        places = asyncio.Semaphore(width)

        async def run(call: ToolCall) -> ToolOutcome:
            async with places:
                return await self._outcome(call)

        try:
            for call in calls:
                await self._on_event(ToolStarted(call))
            # An exception is awaited like a result, so that nothing runs on behind it; cancelling reaches every call.
            outcomes = await asyncio.gather(*(run(call) for call in calls), return_exceptions=True)
            ran = [outcome for outcome in outcomes if isinstance(outcome, ToolOutcome)]
            for call, outcome in zip(calls, ran, strict=False):
                self._keep(call, outcome)
            for outcome_or_error in outcomes:
                if isinstance(outcome_or_error, BaseException):
                    raise outcome_or_error
            for call, outcome in zip(calls, ran, strict=True):
                await self._tell(call, outcome)
        except BaseException:
            self._drop(self.state)
            raise

    async def _outcome(self, call: ToolCall) -> ToolOutcome:
        """What the call gives back, or that the task has no tool time left for it."""
        left_s = self._limits.max_tool_s - self.tool_s
        if left_s <= 0:
            fault = "error: the tools of this task have used up their time: answer without them"
            return ToolOutcome(fault, True, "timeout", self.state, 0.0)
        outcome = await self._executor.run(call, self.state, max_s=left_s)
        self.tool_s += outcome.duration_s
        return outcome

    def _keep(self, call: ToolCall, outcome: ToolOutcome) -> None:
        """Go on from what the call left; from a read_only one nothing is taken over but what it gave back."""
        if self._executor.is_read_only(call.name):
            if outcome.state.workspace != self.state.workspace:
                outcome.state.discard()
        else:
            self.state = outcome.state

    async def _tell(self, call: ToolCall, outcome: ToolOutcome) -> None:
        self.failure = self.failure or _FAILURES[outcome.failure]
        self.images.update(outcome.images)
        self.answer = outcome.answer if self.answer is None else self.answer
        self.observations.append(observe(call, outcome))
        await self._on_event(ToolFinished(call, outcome))

    def _drop(self, state: ToolState) -> None:
        """Discard a workspace that nobody will be told of."""
        if state.workspace != self._before.workspace:
            state.discard()


def observe(call: ToolCall, outcome: ToolOutcome) -> Message:
    """What the model sees of a call's outcome."""
    return Message("tool", (result_of(call, outcome),))


def result_of(call: ToolCall, outcome: ToolOutcome) -> ToolResult:
    """A call's outcome as a part of the conversation."""
    return ToolResult(
        call.id,
        call.name,
        outcome.content,
        outcome.is_error,
        tuple(outcome.images),
        outcome.simulated,
        tuple(returned.file for returned in outcome.files),
    )
