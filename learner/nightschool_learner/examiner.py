"""One held-out task on one adapter: from the prompt to the verdict, in the agent loop of a live task.

Draw 0 is greedy; every other draw is sampled from a seed that depends on set, task, draw and step alone, so that both
adapters, and every later cycle, meet the same chance.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nightschool_server import chat
from nightschool_server.agent.formats import ActionFormat
from nightschool_server.agent.limits import episode_limits
from nightschool_server.agent.loop import Episode, EpisodeResult, Limits, LiveActor, run_episode
from nightschool_server.agent.toolbox import Toolbox
from nightschool_server.app import EvaluationTask, is_correct
from nightschool_server.engine import Delta, Prompt, Sampling
from nightschool_server.errors import ContextOverflowError
from nightschool_server.file_names import media_type_of
from nightschool_server.tools.placing import PlacedFile, place_files
from nightschool_server.tools.state import ToolState
from nightschool_server.uninterrupted import obtained

from nightschool_learner.comparison import ANSWERED
from nightschool_learner.evaluation_results import GREEDY, TaskResult
from nightschool_learner.sampling import AdapterSampler, AnswerSampler, derive_seed
from nightschool_learner.stages import Cycle
from nightschool_learner.turns import turns_of

MAX_TASK_S = 3600.0
"""Wall time of one task: generous, because practice waits for live requests and a slow machine is no failure."""

OVERFLOW = "context_overflow"
"""Outcome of a task that does not fit the model's context at all."""

ACTION_CHARS = 12
"""Of an action's digest: enough to tell the actions of one task apart."""


@dataclass(frozen=True)
class DrawSampler:
    """Samples a draw's steps, each from a seed of its own."""

    sampler: AdapterSampler
    seed: int

    async def sample(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Delta]:
        seeded = replace(sampling, seed=derive_seed(self.seed, len(prompt.messages)))
        async for delta in self.sampler.sample(prompt, seeded):
            yield delta


@dataclass(frozen=True)
class Examiner:
    """Puts held-out tasks to an adapter."""

    cycle: Cycle
    sampler: AnswerSampler
    tools: Toolbox
    root: Path
    """Where tools' workspaces are made."""
    set_digest: str
    action_format: ActionFormat

    async def examine(self, task: EvaluationTask, adapter: str, draw: int) -> TaskResult:
        """One draw of one held-out task on one adapter."""
        images, files = await asyncio.to_thread(lambda: (read_images(task), read_files(task)))
        begun = ToolState.initial(self.cycle.app, self.root)
        state = await obtained(partial(place_files, begun, files), ToolState.discard)
        asked = chat.user(task.prompt, list(images), [one.file for one in files])
        head = (chat.system(self.cycle.app.system_prompt), asked)
        messages, limits = self.action_format.begin(head, self.tools.tools), task_limits(self.cycle)
        try:
            result = await run_episode(Episode(messages, state, limits, images), self._actor(task, adapter, draw))
        except ContextOverflowError as error:
            await asyncio.to_thread(state.discard)
            return TaskResult(task.id, task.family, False, str(error), OVERFLOW, 0, 0, 0, draw=draw)
        await asyncio.to_thread(result.state.discard)
        verdict = self._described(judge(task, result, draw), result)
        return replace(verdict, turns=turns_of(result.messages)) if draw == GREEDY else verdict

    def _actor(self, task: EvaluationTask, adapter: str, draw: int) -> LiveActor:
        sampler, written = AdapterSampler(self.sampler, adapter), self.action_format
        if draw == GREEDY:
            return LiveActor(sampler, self.tools, Sampling(temperature=0.0), action_format=written)
        config = self.cycle.config.evaluate
        drawn = DrawSampler(sampler, derive_seed(0, self.set_digest, task.id, draw))
        sampling = Sampling(temperature=config.temperature, top_p=config.top_p)
        return LiveActor(drawn, self.tools, sampling, action_format=written)

    def _described(self, verdict: TaskResult, result: EpisodeResult) -> TaskResult:
        """The verdict with what was done on the way."""
        calls = [call for step in result.steps for call in step.calls]
        done = [f"{call.name} {call.arguments}" for call in calls] + ([verdict.answer] if verdict.answer else [])
        refusals = self.cycle.config.evaluate.refusal_patterns
        return replace(
            verdict,
            num_unreadable=sum(step.failure == "parse" for step in result.steps),
            num_external=sum(self.tools.is_external(call.name) for call in calls),
            num_unsafe=sum(_matches(self.cycle.app.unsafe, text) for text in done),
            refused=verdict.outcome == ANSWERED and _matches(refusals, verdict.answer, re.IGNORECASE),
            actions=tuple(_digest(self.action_format.key(step.text)) for step in result.steps),
        )


def task_limits(cycle: Cycle) -> Limits:
    """What the episode of one held-out task may use up."""
    return episode_limits(
        cycle.agent,
        max_steps=cycle.app.max_steps,
        max_step_tokens=cycle.config.evaluate.max_tokens,
        max_tokens=cycle.config.evaluate.max_task_tokens,
        max_time_s=MAX_TASK_S,
    )


def judge(task: EvaluationTask, result: EpisodeResult, draw: int = GREEDY) -> TaskResult:
    """The verdict on an episode: solved where it ended with a right final answer."""
    return TaskResult(
        task_id=task.id,
        family=task.family,
        success=result.outcome == ANSWERED and is_correct(task, result.answer),
        answer=result.answer,
        outcome=result.outcome,
        num_steps=result.num_steps,
        num_tool_errors=result.num_tool_errors,
        completion_tokens=result.usage.completion_tokens,
        num_simulated=result.num_simulated,
        draw=draw,
    )


def read_images(task: EvaluationTask) -> dict[str, bytes]:
    """The task's images by sha256, in order."""
    data = [path.read_bytes() for path in task.images]
    return {hashlib.sha256(each).hexdigest(): each for each in data}


def read_files(task: EvaluationTask) -> list[PlacedFile]:
    """The task's files, for its workspace."""
    found = []
    for path in task.files:
        with path.open("rb") as source:
            sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        file = chat.File(path.name, media_type_of(path.name), path.stat().st_size, sha256)
        found.append(PlacedFile(file, path))
    return found


def _matches(patterns: Sequence[str], text: str, flags: int = 0) -> bool:
    return any(re.search(pattern, text, flags) for pattern in patterns)


def _digest(action: str) -> str:
    return hashlib.sha256(action.encode()).hexdigest()[:ACTION_CHARS]
