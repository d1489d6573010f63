"""One step of practice: n candidates, each run in a fork of the tool state, and the one that goes on.

Owns `PracticeActor`, the agent loop's `Actor` in practice. The loop itself is `agent/loop.py`; which tasks
are practised, and how many at once, is `explore.py`'s. Every finished part of a step is a row before the next
part begins, and a step that is in the rows is replayed from them: nothing is sampled or compared twice.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nightschool_server.agent.episode import Episode, Execution, Step, Usage
from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.agent.formats import ActionFormat
from nightschool_server.agent.loop import execute
from nightschool_server.chat import Message, ToolResult, messages_to_json, num_simulated
from nightschool_server.config.practice import ExploreConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.ids import new_id
from nightschool_server.store.request_rows import media_type_of
from nightschool_server.store.store import Store
from nightschool_server.tools.state import ToolState
from nightschool_server.uninterrupted import obtained, uninterrupted

from nightschool_learner import practice_records, seed_records
from nightschool_learner.actions import Action, merge
from nightschool_learner.budget import Budget
from nightschool_learner.comparisons import Comparer, Court
from nightschool_learner.critique import Choice, Contender, Context, choose
from nightschool_learner.parallel import together
from nightschool_learner.practice_records import REFUSED, CandidateRow, StepRow
from nightschool_learner.prompts import CandidateView, in_words
from nightschool_learner.rounds import Group, rounds_of
from nightschool_learner.sampling import AnswerSampler, Sample, derive_seed
from nightschool_learner.seed_records import TaskRow
from nightschool_learner.stages import Progress
from nightschool_learner.writer import Writer


class RefusedPickError(Exception):
    """The step goes on with a tool that practice may not run: the rollout ends here."""


@dataclass(frozen=True)
class Practice:
    """What every rollout of a cycle shares."""

    cycle_seed: int
    adapter: str
    config: ExploreConfig
    store: Store
    writer: Writer
    sampler: AnswerSampler
    executor: ToolExecutor
    action_format: ActionFormat
    explored: Progress
    court: Court
    budget: Budget


class PracticeActor:
    """Takes the steps of one rollout."""

    def __init__(self, practice: Practice, task: TaskRow, rollout_id: str) -> None:
        self._practice = practice
        self._task = task
        self._rollout_id = rollout_id
        self._recorded = practice_records.steps_of(practice.store, rollout_id)
        self._num_before = 0
        """Messages in front of what the rollout added."""
        self._brought: Path | None = None
        """The workspace that the rollout began with, which is its caller's."""
        self._kept_images: set[str] = set()

    async def act(self, episode: Episode) -> Step:
        """Sample, run and choose; the episode continues from the pick. See `agent.loop.Actor`."""
        if not episode.steps:
            self._num_before, self._brought = len(episode.messages), episode.state.workspace
        position = len(episode.steps)
        step = await self._replayable(episode, position)
        executions: dict[int, Execution] = {}
        if step is None:
            step, candidates, executions = await self._sample_step(episode, position)
        else:
            candidates = practice_records.candidates_of(self._practice.store, step.id)
        picked = candidates[step.picked if step.picked is not None else await self._pick(episode, step, candidates)]
        await self._drop_losers(executions, picked.position)
        if picked.failure == REFUSED:
            raise RefusedPickError(picked.text)
        execution = executions.get(picked.position) or await self._run(
            picked.text, episode, cut=picked.failure == "budget"
        )
        await self._leave(episode.state, execution.state)
        usage = Usage(completion_tokens=len(picked.token_ids))
        return Step(picked.text, execution, picked.token_ids, usage=usage)

    async def _replayable(self, episode: Episode, position: int) -> StepRow | None:
        """The recorded step at `position`, unless the conversation has come to differ from the recorded one."""
        if position >= len(self._recorded):
            return None
        step = self._recorded[position]
        if step.history == messages_to_json(episode.messages):
            return step
        # A tool gave back something else than before the restart: what was recorded from here on is of another world.
        self._recorded = self._recorded[:position]
        await self._practice.writer.write(lambda db: practice_records.drop_steps(db, self._rollout_id, position))
        return None

    async def _sample_step(
        self, episode: Episode, position: int
    ) -> tuple[StepRow, list[CandidateRow], dict[int, Execution]]:
        self._practice.budget.check()
        samples, actions, executions = await self._try(episode, position)
        step = StepRow(
            id=new_id("step"),
            rollout_id=self._rollout_id,
            position=position,
            history=messages_to_json(episode.messages),
            picked=None,
            picked_by="",
            simulated=num_simulated(episode.messages) > 0,
            num_tokens=sum(len(sample.token_ids) for sample in samples),
            num_calls=sum(len(execution.calls) for execution in executions.values()),
        )
        candidates = [_candidate(step.id, i, action, executions[i]) for i, action in enumerate(actions)]
        images = await uninterrupted(asyncio.to_thread(self._keep_images, episode, executions.values()))

        def insert(db: sqlite3.Connection) -> None:
            practice_records.insert_step(db, step, candidates)
            seed_records.link_blobs(db, self._task.id, images)

        await self._practice.writer.write(insert)
        self._practice.explored.advance(0, **_counts(step, candidates))
        return step, candidates, executions

    async def _try(self, episode: Episode, position: int) -> tuple[list[Sample], list[Action], dict[int, Execution]]:
        """Sample and run, round by round, until the samples are all there or agree on an action that ran."""
        samples: list[Sample] = []
        actions: list[Action] = []
        executions: dict[int, Execution] = {}
        for groups in rounds_of(self._practice.config):
            samples += await self._samples(groups, episode, position)
            # An action keeps its place: those of this round that are new come after those of the last one.
            actions = merge(samples, self._practice.action_format)
            new = range(len(executions), len(actions))
            ran = await together(*(self._run_action(actions[i], episode) for i in new))
            executions |= dict(zip(new, ran, strict=True))
            if len(actions) == 1 and not executions[0].failure:
                break
        return samples, actions, executions

    def _keep_images(self, episode: Episode, executions: Iterable[Execution]) -> list[str]:
        """Store what tools have shown so far, for trainer and critic to find. Returns the new ones' sha256."""
        shown = dict(episode.images)
        for execution in executions:
            shown |= execution.images
        new = {sha256: data for sha256, data in shown.items() if sha256 not in self._kept_images}
        for data in new.values():
            self._practice.store.put_blob(data, media_type_of(data))
        self._kept_images.update(new)
        return list(new)

    async def _samples(self, groups: Sequence[Group], episode: Episode, position: int) -> list[Sample]:
        """The samples of one round in their order, a call for each temperature."""
        calls = [self._call(episode, self._sampling(group, episode, position)) for group in groups]
        by_position: dict[int, Sample] = {}
        for group, answers in zip(groups, await together(*calls), strict=True):
            by_position |= dict(zip(group.positions, answers, strict=True))
        return [by_position[at] for at in sorted(by_position)]

    def _sampling(self, group: Group, episode: Episode, position: int) -> Sampling:
        seed = derive_seed(self._practice.cycle_seed, "step", self._task.slot, position, group.kind)
        return Sampling(
            max_tokens=episode.num_step_tokens,
            temperature=group.temperature,
            top_p=self._practice.config.top_p,
            n=len(group.positions),
            seed=seed + group.num_before,
        )

    async def _call(self, episode: Episode, sampling: Sampling) -> tuple[Sample, ...]:
        tools = self._practice.action_format.shown(self._practice.executor.tools)
        prompt = Prompt(episode.messages, tools, episode.images)
        return (await self._practice.sampler.sample(prompt, sampling, adapter=self._practice.adapter)).answers

    async def _run_action(self, action: Action, episode: Episode) -> Execution:
        return await self._run(action.sample.text, episode, cut=action.sample.finish_reason == "length")

    async def _run(self, text: str, episode: Episode, *, cut: bool) -> Execution:
        """Execute a candidate in a fork of the state of its own."""
        fork = await _fork(episode.state)
        return await execute(
            text,
            fork,
            self._practice.executor,
            finish_reason="length" if cut else "stop",
            limits=episode.limits_left,
            action_format=self._practice.action_format,
        )

    async def _pick(self, episode: Episode, step: StepRow, candidates: Sequence[CandidateRow]) -> int:
        """Choose, write the choice, and count it. Returns the position of the pick."""
        practice = self._practice
        contenders = [Contender(c.position, c.num_samples, c.logprob, bool(c.failure)) for c in candidates]
        comparer = Comparer(practice.court, step.id, self._context(episode), _views(candidates), contenders)
        choice = await choose(contenders, comparer.meet)
        await practice.writer.write(lambda db: practice_records.pick(db, step.id, choice))
        self._count(choice, candidates)
        return choice.picked

    def _context(self, episode: Episode) -> Context:
        history = episode.messages[self._num_before :]
        return Context(self._task.prompt, self._task.images, history, episode.images)

    def _count(self, choice: Choice, candidates: Sequence[CandidateRow]) -> None:
        agreeing = next(c.num_samples for c in candidates if c.position == choice.picked)
        self._practice.explored.advance(0, **{f"picked_by_{choice.picked_by}": 1, "samples_agreeing": agreeing})
        if choice.abstention:
            self._practice.court.compared.advance(0, **{f"abstained_{choice.abstention}": 1})

    async def _leave(self, before: ToolState, after: ToolState) -> None:
        """Drop the state before the step: only now that the pick's fork is whole does the rollout go on from that."""
        if before.workspace not in (None, self._brought, after.workspace):
            await asyncio.to_thread(before.discard)

    async def _drop_losers(self, executions: dict[int, Execution], picked: int) -> None:
        losers = [e.state for position, e in executions.items() if position != picked and e.state.workspace is not None]
        for state in losers:
            await asyncio.to_thread(state.discard)


def observation_of(messages: Sequence[Message]) -> str:
    """What the tools gave back, as the critic reads it."""
    return "\n".join(in_words(part) for message in messages for part in message.parts if isinstance(part, ToolResult))


def _views(candidates: Sequence[CandidateRow]) -> dict[int, CandidateView]:
    return {c.position: CandidateView(c.text, c.observation, c.images) for c in candidates}


def _counts(step: StepRow, candidates: Sequence[CandidateRow]) -> Counter[str]:
    """What a step adds to the counts of its stage, named as `practice_counts.explore_counts` names them."""
    counts = Counter(f"failed_{c.failure}" for c in candidates if c.failure)
    counts.update("simulated" for c in candidates if c.simulated)
    num_samples = sum(c.num_samples for c in candidates)
    counts.update(samples=num_samples, tokens=step.num_tokens, calls=step.num_calls, distinct_actions=len(candidates))
    counts.update({f"samples_at_{step.position + 1}": num_samples, f"actions_at_{step.position + 1}": len(candidates)})
    return counts


def _candidate(step_id: str, position: int, action: Action, execution: Execution) -> CandidateRow:
    return CandidateRow(
        id=new_id("cand"),
        step_id=step_id,
        position=position,
        text=action.sample.text,
        token_ids=action.sample.token_ids,
        logprob=action.sample.logprob,
        num_samples=action.num_samples,
        observation=observation_of(execution.observations),
        failure=execution.failure,
        final=execution.final,
        simulated=num_simulated(execution.observations) > 0,
        images=tuple(sha256 for message in execution.observations for sha256 in message.images),
    )


async def _fork(state: ToolState) -> ToolState:
    # Copying files is slow enough to hold up every other rollout.
    return state.fork() if state.workspace is None else await obtained(state.fork, ToolState.discard)
