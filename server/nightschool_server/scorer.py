"""An application's own opinion of a step: a function from what was tried to a number.

    @app.scorer
    def score(step: ScoredStep) -> float | None:
        \"\"\"1 where the answer names a price, None where this cannot be said.\"\"\"
        return 1.0 if step.answer and step.answer.isdigit() else None

Owns `ScoredStep`, the place where an application puts its scorer, and the form in which a tool worker runs it: the
scorer is application code, so it runs where tools run. Light, like all that workers import.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from nightschool_server.chat import ToolSpec
from nightschool_server.errors import AppError
from nightschool_server.tools.tool import Tool

SCORER_TOOL = "app.scorer"
"""The name under which a worker finds the scorer; the model is never shown it."""


@dataclass(frozen=True)
class ScoredStep:
    """What a scorer is given: a candidate's action, and how it came to it."""

    task: str
    turns: tuple[tuple[str, str], ...]
    """Role and text of each turn after the task and before the action."""
    action: str
    """The assistant's raw text, tool calls included."""
    observation: str
    """What the tools gave back; empty for an answer."""
    answer: str | None
    """The final answer, where the action is one."""


ScoreStep = Callable[[ScoredStep], float | Awaitable[float | None] | None]


class Scorer:
    """The place of an application's scorer: given as `App(scorer=...)`, or put there by `@app.scorer`."""

    def __init__(self, function: ScoreStep | None = None) -> None:
        self.function = function

    def __call__(self, function: ScoreStep) -> ScoreStep:
        """Take `function` as the scorer; it stays what it is."""
        if self.function is not None:
            raise AppError(f"the application has a scorer already, {self.function!r}: leave one of them out")
        self.function = function
        return function

    @property
    def tool(self) -> Tool | None:
        """The scorer as a worker runs it."""
        if self.function is None:
            return None
        return Tool(ToolSpec(SCORER_TOOL, "Score a step.", "{}"), self._run, "read_only")

    async def _run(
        self, task: str, turns: list[Any], action: str, observation: str, answer: str | None
    ) -> dict[str, float | None]:
        assert self.function is not None
        turns_given = tuple((str(role), str(text)) for role, text in turns)
        value = self.function(ScoredStep(task, turns_given, action, observation, answer))
        score = await value if inspect.isawaitable(value) else value
        if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
            raise ValueError(f"the scorer returned {score!r}: return a finite number, or None where it cannot say")
        return {"score": None if score is None else float(score)}
