"""What every benchmark has in common: tasks, what the agent did with one, scored rows, metrics with denominators.

Owns the types between the formats (`gta.py`, `gaia.py`), the run (`run.py`) and its report (`report.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nightschool_learner.statistics import Interval, wilson

ANSWERED = "answered"
"""Outcome of an attempt that ended with a final answer; no other one can be right."""


@dataclass(frozen=True)
class BenchmarkTask:
    """One task as the agent is given it."""

    id: str
    prompt: str
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Action:
    """One thing that the agent asked to be executed: a tool call, or a block of code."""

    tool: str
    """`python` for a block of code; empty where the action could not be read."""
    is_error: bool


@dataclass(frozen=True)
class Attempt:
    """What the agent did with one task."""

    task_id: str
    answer: str
    """The last text, verbatim."""
    outcome: str
    """answered, max_steps, max_tokens, max_time, deadline, context_overflow or refused."""
    actions: tuple[Action, ...] = ()
    tools: tuple[str, ...] = ()
    """That were called, in their order: by actions, or from within their code."""
    num_steps: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    response_id: str = ""
    error: str = ""
    """Why the server did not run it, where it did not."""

    @property
    def final_answer(self) -> str:
        """The answer that counts: empty where the agent ended without one."""
        return self.answer if self.outcome == ANSWERED else ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Attempt:
        """The inverse of `dataclasses.asdict`."""
        actions = tuple(Action(**action) for action in value["actions"])
        return cls(**{**value, "actions": actions, "tools": tuple(value["tools"])})


@dataclass(frozen=True)
class Row:
    """An attempt with its scores."""

    attempt: Attempt
    scores: Mapping[str, float | None]
    """By rule; None where the rule does not apply, or cannot be computed here."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the task is, as far as scores depend on it."""


@dataclass(frozen=True)
class Metric:
    """A sum of scores over a denominator that is said in words."""

    name: str
    total: float
    n: int
    of: str
    """What the denominator counts."""
    num_unscored: int = 0
    """Of the denominator: counted as 0, because the rule could not be computed here."""

    @property
    def value(self) -> float | None:
        """In [0, 1]; None where there is nothing to divide by."""
        return self.total / self.n if self.n else None

    @property
    def interval(self) -> Interval | None:
        """Wilson's 95% interval, where every one of the denominator was scored as right or wrong."""
        is_count = self.n > 0 and not self.num_unscored and self.total == round(self.total)
        return wilson(round(self.total), self.n) if is_count else None


class Benchmark(Protocol):
    """A data set that was read from its folder, and its rules."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def digest(self) -> str:
        """sha256 over what the tasks and their answers are."""
        ...

    @property
    def tasks(self) -> Sequence[BenchmarkTask]:
        """In the data set's order."""
        ...

    def score(self, attempt: Attempt) -> Row:
        """An attempt by every rule."""
        ...

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """The rules' sums over rows of tasks that were attempted."""
        ...
