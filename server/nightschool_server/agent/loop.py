"""The agent loop: sample a step, run its tool calls, append what came back, until an answer or a limit.

It lives once. A live task runs it with a `LiveActor`, which samples one step and executes it; practice
runs it with an actor of its own, which samples n candidates, runs `execute` on each in a fork of the tool
state and continues from the pick. Owns the order of events and what malformed output becomes. The types are
`episode.py`; who runs a tool is `executors.py`; who samples is the caller's `Sampler`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from nightschool_server.agent.calls import OnEvent, StepCalls, observe, result_of
from nightschool_server.agent.episode import (
    DEFAULT_LIMITS,
    Episode,
    EpisodeResult,
    Event,
    Execution,
    Failure,
    Finished,
    Limits,
    Outcome,
    Step,
    StepFinished,
    TextDelta,
    ToolFinished,
    ToolStarted,
    Usage,
)
from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.agent.formats import TOOL_CALLS, ActionFormat
from nightschool_server.chat import Message, Text, ToolCall, tool_result, user
from nightschool_server.engine import (
    BASE,
    LIVE_PRIORITY,
    Delta,
    Engine,
    FinishReason,
    GenerateRequest,
    Prompt,
    Sampling,
)
from nightschool_server.errors import ContextOverflowError, EngineDeadError
from nightschool_server.tools.state import ToolState

__all__ = [
    "Actor", "EngineSampler", "Episode", "EpisodeResult", "Event", "Execution", "Failure", "Finished", "Limits",
    "LiveActor", "OnEvent", "Outcome", "Sampler", "Step", "StepFinished", "TextDelta", "ToolFinished", "ToolStarted",
    "Usage", "execute", "ignore", "observe", "result_of", "run_episode",
]  # fmt: skip


async def ignore(event: Event) -> None:
    """For callers that need no events."""


class Actor(Protocol):
    """Takes one step of an episode."""

    async def act(self, episode: Episode) -> Step:
        """The step that the episode continues with, executed. Only errors of the engine raise."""
        ...


class Sampler(Protocol):
    """Samples from a model: the engine in this process, or a server over gRPC."""

    def sample(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Delta]:
        """Stream answers, every delta with its token ids; closing the iterator aborts them."""
        ...


class EngineSampler:
    """Samples from the engine in this process."""

    def __init__(self, engine: Engine, request_id: str, *, adapter: str = BASE, priority: int = LIVE_PRIORITY) -> None:
        """Step i of the task is the engine's request `request_id`-i."""
        self._engine = engine
        self._request_id = request_id
        self._adapter = adapter
        self._priority = priority
        self._num_requests = 0

    def sample(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Delta]:
        request_id = f"{self._request_id}-{self._num_requests}"
        self._num_requests += 1
        return self._engine.generate(GenerateRequest(request_id, prompt, sampling, self._adapter, self._priority))


class LiveActor:
    """Samples a step once and executes it."""

    def __init__(
        self,
        sampler: Sampler,
        executor: ToolExecutor,
        sampling: Sampling | None = None,
        on_event: OnEvent = ignore,
        *,
        action_format: ActionFormat = TOOL_CALLS,
    ) -> None:
        """`sampling.max_tokens` is set by the limits of the episode."""
        self._sampler = sampler
        self._executor = executor
        self._sampling = replace(sampling or Sampling(), n=1)
        self._on_event = on_event
        self._format = action_format

    async def act(self, episode: Episode) -> Step:
        deltas: list[Delta] = []
        prompt = Prompt(episode.messages, self._format.shown(self._executor.tools), episode.images)
        sampling = replace(self._sampling, max_tokens=episode.num_step_tokens)
        stream = self._sampler.sample(prompt, sampling)
        try:
            async for delta in stream:
                deltas.append(delta)
                await self._on_event(TextDelta(delta))
        finally:
            if (close := getattr(stream, "aclose", None)) is not None:
                await close()
        text = "".join(delta.text for delta in deltas)
        execution = await execute(
            text,
            episode.state,
            self._executor,
            finish_reason=_finish_reason(deltas),
            limits=episode.limits_left,
            on_event=self._on_event,
            action_format=self._format,
        )
        return Step(
            text,
            execution,
            tuple(token for delta in deltas for token in delta.token_ids),
            tuple(logprob for delta in deltas for logprob in delta.logprobs),
            _usage(deltas),
        )


async def execute(
    text: str,
    state: ToolState,
    executor: ToolExecutor,
    *,
    finish_reason: FinishReason = "stop",
    limits: Limits = DEFAULT_LIMITS,
    on_event: OnEvent = ignore,
    action_format: ActionFormat = TOOL_CALLS,
) -> Execution:
    """Run what a step asks for, on `state`: fork it first where the step may be dropped.

    A step whose calls cannot all be read runs none of them. One cut off by its token limit runs nothing
    and ends the episode. Calls run in their order, each on the state that the last one left; see `calls.py`.
    """
    parsed = action_format.parse(text, executor.tools)
    if finish_reason == "length":
        return Execution(parsed.text, (), (), "budget", True, state)
    fault = parsed.error
    if fault is None and len(parsed.calls) > limits.max_calls:
        fault = f"the step has {len(parsed.calls)} tool calls; at most {limits.max_calls} are allowed"
    if fault is None and not parsed.calls:
        if parsed.text and action_format.answers_in_text:
            return Execution(parsed.text, (), (), "", True, state)
        fault = "the step holds no action" if parsed.text else "the step is empty"
    if fault is not None:
        told = f"error: {fault}; {action_format.hint}"
        # A template that counts turns by their calls takes no result of a call that it has not seen.
        observation = user(told) if parsed.as_parts else tool_result(ToolCall("call_0", "", "{}"), told, is_error=True)
        return Execution(parsed.text, (), (observation,), "parse", False, state)
    calls = StepCalls(action_format.executor(executor, limits, on_event), state, limits, on_event)
    await calls.run_all(parsed.calls)
    return Execution(
        parsed.text if calls.answer is None else calls.answer,
        parsed.calls,
        tuple(calls.observations),
        calls.failure,
        calls.answer is not None,
        calls.state,
        calls.images,
        calls.tool_s,
        Message("assistant", (*_text(parsed.text), *parsed.calls)) if parsed.as_parts else None,
    )


def _text(text: str) -> tuple[Text, ...]:
    return (Text(text),) if text else ()


async def run_episode(episode: Episode, actor: Actor, on_event: OnEvent = ignore) -> EpisodeResult:
    """Take steps until the model answers or a limit is reached.

    Cancelling stops the model and the running tool at once; then, and whenever this raises, only the
    workspace that `episode` came with is the caller's to discard. Raises what the engine raises; a context
    that overflows after the first step is the limit `max_tokens`.
    """
    begun = episode
    ending: tuple[Outcome, str] | None = None
    try:
        async with asyncio.timeout(episode.limits.max_time_s) as deadline:
            while ending is None:
                try:
                    step = await actor.act(episode)
                except ContextOverflowError as error:
                    if not episode.steps:
                        raise
                    ending = "max_tokens", str(error)
                    break
                episode = episode.after(step)
                await on_event(StepFinished(len(episode.steps) - 1, step))
                ending = _ending(episode)
    except TimeoutError:
        if not deadline.expired():
            _drop(episode.state, begun.state)
            raise
        ending = "max_time", f"the task took more than {episode.limits.max_time_s:g} s"
    except BaseException:
        _drop(episode.state, begun.state)
        raise
    assert ending is not None
    result = _result(episode, ending, len(begun.messages))
    await on_event(Finished(result))
    return result


def _drop(state: ToolState, kept: ToolState) -> None:
    """Discard a workspace that nobody will be told of."""
    if state.workspace != kept.workspace:
        state.discard()


def _ending(episode: Episode) -> tuple[Outcome, str] | None:
    """Why the episode ends after its last step, if it does."""
    limits, last = episode.limits, episode.steps[-1].execution
    if last.final:
        cut = f"the step was cut off after {episode.steps[-1].usage.completion_tokens} tokens"
        return ("max_tokens", cut) if last.failure == "budget" else ("answered", "")
    recent = episode.steps[-limits.max_malformed_steps :]
    if len(recent) == limits.max_malformed_steps and all(step.execution.failure == "parse" for step in recent):
        return "max_steps", f"{len(recent)} steps in a row could not be read"
    if len(episode.steps) >= limits.max_steps:
        return "max_steps", f"no answer after {limits.max_steps} steps"
    if episode.num_step_tokens <= 0:
        return "max_tokens", f"no answer after {episode.usage.completion_tokens} tokens"
    return None


def _result(episode: Episode, ending: tuple[Outcome, str], start: int) -> EpisodeResult:
    outcome, reason = ending
    ended_in_text = bool(episode.steps) and episode.steps[-1].execution.final
    return EpisodeResult(
        outcome,
        reason,
        episode.steps[-1].execution.answer if ended_in_text and outcome != "max_time" else "",
        episode.messages[start:],
        episode.steps,
        episode.usage,
        episode.state,
    )


def _finish_reason(deltas: list[Delta]) -> FinishReason:
    reason = next((delta.finish_reason for delta in reversed(deltas) if delta.finish_reason), None)
    if reason is None or reason == "cancelled":
        raise EngineDeadError("the engine stopped in the middle of a step")
    return reason


def _usage(deltas: list[Delta]) -> Usage:
    last = deltas[-1]
    return Usage(last.num_prompt_tokens, sum(len(delta.token_ids) for delta in deltas), last.num_cached_tokens)
