"""A task on its way through the agent loop: its limits, steps, end, and the events that tell of it.

Owns frozen types only, which live serving, practice and the service's stream share; `loop.py` moves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nightschool_server.chat import Message, ToolCall, ToolResult, assistant, num_simulated
from nightschool_server.engine import Delta
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolOutcome

Outcome = Literal["answered", "max_steps", "max_tokens", "max_time"]
Failure = Literal["", "parse", "schema", "execution", "budget", "refused"]
"""Which fact speaks against a step. "refused": practice may not run its tool; no preference follows."""


@dataclass(frozen=True)
class Limits:
    """What an episode may use up."""

    max_steps: int = 8
    max_step_tokens: int = 512
    """Sampled in one step."""
    max_tokens: int = 4096
    """Sampled in all steps."""
    max_time_s: float = 300.0
    max_malformed_steps: int = 3
    """So many in a row that call nothing readable and answer nothing end the episode."""
    max_calls: int = 16
    """Tool calls in one step."""
    max_parallel_calls: int = 4
    """Calls of one step that run side by side, where they are read_only."""
    max_tool_s: float = 120.0
    """What all tool calls may take together."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Usage:
    """Tokens of one or more model calls."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True)
class Execution:
    """What became of the text of a step."""

    answer: str
    """What stands outside tool calls; the final answer where `final`."""
    calls: tuple[ToolCall, ...]
    observations: tuple[Message, ...]
    """One for each call, or the one that says why there was none."""
    failure: Failure
    """Of the first call that failed."""
    final: bool
    state: ToolState
    images: Mapping[str, bytes] = field(default_factory=dict)
    """That its tools gave back, by sha256."""
    tool_s: float = 0.0
    """What its calls took, added up."""
    said: Message | None = None
    """How the step stands in the conversation where that is not its text verbatim."""


@dataclass(frozen=True)
class Step:
    """A sampled step and what became of it."""

    text: str
    """Verbatim."""
    execution: Execution
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    usage: Usage = Usage()

    @property
    def messages(self) -> tuple[Message, ...]:
        """What the step adds to the conversation."""
        return (self.execution.said or assistant(self.text), *self.execution.observations)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return self.execution.calls

    @property
    def observations(self) -> tuple[Message, ...]:
        return self.execution.observations

    @property
    def failure(self) -> Failure:
        return self.execution.failure

    @property
    def final(self) -> bool:
        return self.execution.final

    @property
    def state(self) -> ToolState:
        return self.execution.state


@dataclass(frozen=True)
class Episode:
    """A task on its way."""

    messages: tuple[Message, ...]
    """The conversation so far, the system prompt first."""
    state: ToolState
    limits: Limits = Limits()
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Of the messages, by sha256, where the sampler needs their bytes."""
    steps: tuple[Step, ...] = ()

    @property
    def usage(self) -> Usage:
        return sum((step.usage for step in self.steps), Usage())

    @property
    def num_step_tokens(self) -> int:
        """How many tokens the next step may have."""
        return min(self.limits.max_step_tokens, self.limits.max_tokens - self.usage.completion_tokens)

    @property
    def limits_left(self) -> Limits:
        """What the next step may use up of the limits on tools."""
        used_s = sum(step.execution.tool_s for step in self.steps)
        return replace(self.limits, max_tool_s=self.limits.max_tool_s - used_s)

    def after(self, step: Step) -> Episode:
        """The episode that continues from `step`."""
        messages, images = (*self.messages, *step.messages), {**self.images, **step.execution.images}
        return replace(self, messages=messages, state=step.execution.state, images=images, steps=(*self.steps, step))


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended."""

    outcome: Outcome
    reason: str
    """One sentence that names the limit which ended it; empty where it was answered."""
    answer: str
    """Empty unless answered, or cut off by a limit on tokens."""
    messages: tuple[Message, ...]
    """All turns after the start."""
    steps: tuple[Step, ...]
    usage: Usage
    state: ToolState
    """The caller discards it."""

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def num_tool_errors(self) -> int:
        """Observations that are errors."""
        return sum(
            isinstance(part, ToolResult) and part.is_error for message in self.messages for part in message.parts
        )

    @property
    def num_simulated(self) -> int:
        """Observations that a simulator gave."""
        return num_simulated(self.messages)


@dataclass(frozen=True)
class TextDelta:
    """New text of the step in progress."""

    delta: Delta


@dataclass(frozen=True)
class ToolStarted:
    """A call that is about to run."""

    call: ToolCall


@dataclass(frozen=True)
class ToolFinished:
    """A call and what it gave back."""

    call: ToolCall
    outcome: ToolOutcome


@dataclass(frozen=True)
class StepFinished:
    """A step that is now part of the conversation."""

    position: int
    step: Step


@dataclass(frozen=True)
class Finished:
    """Last."""

    result: EpisodeResult


Event = TextDelta | ToolStarted | ToolFinished | StepFinished | Finished
