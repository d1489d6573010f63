"""Stages with one guard taken out, as recipes name them: `stages.explore = "bench.nights.unguarded:one_order"`.

Each does what METHOD.md finds in SPORT's public code, and leaves the rest of the stage as it ships. Explore stages:

- `one_order`: the critic is asked once for two candidates, whichever has more samples shown first;
- `first_by_default`: where the critic cannot be sure, the candidate that was sampled first (the cold one) wins;
- `failing`: of the critic's answers FAILURES cannot be read; guarded, to set beside `failing_first`;
- `failing_first`: the same, and a failure is a win of the candidate that was sampled first;
- `shared_state`: the candidates of a step act on one state, one after another, and so does whatever comes next.

A promote stage: `ungated` measures as ever, and promotes what did not pass.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nightschool_learner.critics import open_critic
from nightschool_learner.critique import Context, Critic, Duel, Verdict
from nightschool_learner.evaluation_records import EvaluationRow
from nightschool_learner.explore import ExploreStage
from nightschool_learner.panel import Case, Panel
from nightschool_learner.panels import open_panel
from nightschool_learner.promote import PromoteStage, numbers
from nightschool_learner.prompts import CandidateView
from nightschool_learner.sampling import AnswerSampler, patiently
from nightschool_learner.stages import Cycle, Ending
from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.chat import ToolCall, ToolSpec, canonical_json, messages_to_json
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolOutcome

FAILURES = 0.3
"""Share of the answers of a failing critic that nobody can read."""


def one_order() -> ExploreStage:
    """Without the second order."""
    return ExploreStage(open_critic=open_one_order)


def first_by_default() -> ExploreStage:
    """Without abstention."""
    return ExploreStage(open_panel=open_first_by_default)


def ungated() -> PromoteStage:
    """Without the gate's word."""
    return Ungated()


class Ungated(PromoteStage):
    """Promotes by force what the gate refuses."""

    async def _reject(self, cycle: Cycle, row: EvaluationRow) -> Ending:
        await patiently(
            cycle,
            lambda: cycle.client.admin.adapters.promote(
                row.candidate, reason="nobody asks the gate", force=True, request_id=f"promote-{cycle.id}"
            ),
        )
        return Ending("promoted", f"{row.candidate} replaced {row.incumbent} by force: {numbers(row)}")


def failing() -> ExploreStage:
    """A critic that often says nothing readable, before every guard."""
    return ExploreStage(open_critic=open_failing)


def failing_first() -> ExploreStage:
    """The same critic without abstention."""
    return ExploreStage(open_critic=open_failing, open_panel=open_first_by_default)


def shared_state() -> ExploreStage:
    """Without forks."""
    return ExploreStage(open_tools=open_shared_tools)


@dataclass
class OneOrder:
    """A critic that is never asked the other way round: it is taken to say the same. A `Critic`."""

    inner: Critic
    _said: dict[str, tuple[CandidateView, Verdict]] = field(default_factory=dict)
    """By question: who was shown first, and the verdict."""

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        key = _question(context, *sorted((first, second), key=repr))
        if key not in self._said:
            self._said[key] = first, await self.inner.compare(context, first, second)
        shown_first, verdict = self._said[key]
        return verdict if shown_first == first else flipped(verdict)


@dataclass(frozen=True)
class Failing:
    """A critic of whose answers a share is lost, the same ones in every run. A `Critic`."""

    inner: Critic
    share: float = FAILURES

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        digest = hashlib.sha256(_question(context, first, second).encode()).digest()
        if int.from_bytes(digest[:4], "big") < self.share * 2**32:
            return Verdict("invalid", 0.0, "", 0, why="malformed")
        return await self.inner.compare(context, first, second)


@dataclass(frozen=True)
class FirstByDefault:
    """Decides what nobody else did, for the candidate that was sampled first. A `panel.Component`."""

    name: str = "first"

    async def meet(self, case: Case, a: int, b: int) -> Duel:
        return Duel(min(a, b), component=self.name)


class SharedTools:
    """Tools that know one state for each rollout, whatever state a call comes with. A `ToolExecutor`.

    For tools that keep no files: what they keep in their state is shared, and the stage throws workspaces away.
    """

    def __init__(self, inner: ToolExecutor) -> None:
        self._inner = inner
        self._states: dict[Path, ToolState] = {}
        self._turns: defaultdict[Path, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self._inner.tools

    def is_read_only(self, name: str) -> bool:
        return self._inner.is_read_only(name)

    async def run(self, call: ToolCall, state: ToolState, *, max_s: float = math.inf) -> ToolOutcome:
        # A rollout's states, and no other's, share a folder for workspaces.
        async with self._turns[state.root]:
            outcome = await self._inner.run(call, self._states.get(state.root, state), max_s=max_s)
            self._states[state.root] = outcome.state
            return outcome


def flipped(verdict: Verdict) -> Verdict:
    """The same opinion of the two candidates shown the other way round."""
    if verdict.winner == "invalid":
        return verdict
    winner = "second" if verdict.winner == "first" else "first"
    return replace(verdict, winner=winner, margin_nats=-verdict.margin_nats, prompt_tokens=0)


def _question(context: Context, *views: CandidateView) -> str:
    shown = [[view.action, view.observation] for view in views]
    return canonical_json([context.task, list(context.images), messages_to_json(context.history), shown])


@asynccontextmanager
async def open_one_order(cycle: Cycle, sampler: AnswerSampler) -> AsyncIterator[Critic]:
    async with open_critic(cycle, sampler) as critic:
        yield OneOrder(critic)


@asynccontextmanager
async def open_failing(cycle: Cycle, sampler: AnswerSampler) -> AsyncIterator[Critic]:
    async with open_critic(cycle, sampler) as critic:
        yield Failing(critic)


@asynccontextmanager
async def open_first_by_default(cycle: Cycle, sampler: AnswerSampler) -> AsyncIterator[Panel]:
    async with open_panel(cycle, sampler) as panel:
        yield replace(panel, components=(*panel.components, FirstByDefault()))


@asynccontextmanager
async def open_shared_tools(*arguments: Any, **settings: Any) -> AsyncIterator[ToolExecutor]:
    async with open_tools(*arguments, **settings) as tools:
        yield SharedTools(tools)
