"""The probe: a few quick attempts at every written task, so that practice is spent at the edge of what is solved.

A task that is always solved, or never, makes no preferences; see `solve_rate.py` for what solved means. An attempt is a
whole episode, as a live task would run it: at the shop, of tasks whose first action was agreed on by four samples half
of all pairs came nevertheless, from later steps; of tasks whose four episodes were the same, a tenth.

The unit of work is a task: its row takes the estimate, and the verdict as its state, in one transaction. What a sample
draws derives from the cycle's seed, slot, draw and step. Owns the probe's columns of `tasks`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.agent.formats import ActionFormat, open_format
from nightschool_server.agent.limits import call_limits
from nightschool_server.agent.loop import EpisodeResult, LiveActor, run_episode
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.chat import canonical_json
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError, InvalidRequestError

from nightschool_learner import families
from nightschool_learner.comparison import ANSWERED
from nightschool_learner.critique import Contender, Context, Verdict
from nightschool_learner.examiner import DrawSampler
from nightschool_learner.explore import first_episode
from nightschool_learner.panel import Case, Score
from nightschool_learner.parallel import for_each, together
from nightschool_learner.practice import observation_of
from nightschool_learner.prompts import CandidateView
from nightschool_learner.sampling import AdapterSampler, AnswerSampler, derive_seed
from nightschool_learner.scoring import open_scorer
from nightschool_learner.seed_records import KEPT, TaskRow, tasks_of
from nightschool_learner.solve_rate import ALWAYS, NEVER, Answer, Estimate, estimate_of, same_answer
from nightschool_learner.stages import Cycle, Progress
from nightschool_learner.writer import Writer

logger = logging.getLogger(__name__)

OpenTools = Callable[..., AbstractAsyncContextManager[ToolExecutor]]
MAX_ANSWER_CHARS = 200
"""Of an answer in the task's row."""


@dataclass(frozen=True)
class Attempted:
    """One sample's attempt at a task."""

    answer: Answer
    tokens: int
    tools: tuple[str, ...] = ()
    """That it called."""


@dataclass(frozen=True)
class Probe:
    """Makes the attempts of a cycle."""

    cycle: Cycle
    sampler: AnswerSampler
    executor: ToolExecutor
    action_format: ActionFormat
    root: Path
    """Where tools' workspaces are made."""
    score: Score | None
    """The application's scorer, where it has one."""

    async def attempts(self, task: TaskRow) -> list[Attempted]:
        """Every sample's attempt. Raises InvalidRequestError for a task that nobody can begin."""
        config = self.cycle.config.synthesize.probe
        if config.attempt == "action":
            return await self._first_actions(task)
        return await together(*(self._episode(task, draw) for draw in range(config.num_samples)))

    async def _first_actions(self, task: TaskRow) -> list[Attempted]:
        config, root = self.cycle.config.synthesize.probe, self.root / task.id
        episode = await first_episode(self.cycle, task, root, self)
        await asyncio.to_thread(episode.state.discard)
        sampling = Sampling(
            max_tokens=episode.num_step_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            n=config.num_samples,
            seed=self._seed(task, 0),
        )
        tools = self.action_format.shown(self.executor.tools)
        try:
            samples = await self.sampler.sample(Prompt(episode.messages, tools), sampling, adapter=self.cycle.incumbent)
        except ContextOverflowError:
            return [Attempted(Answer(""), 0)] * config.num_samples
        return [self._first_action(sample.text, len(sample.token_ids)) for sample in samples.answers]

    def _first_action(self, text: str, num_tokens: int) -> Attempted:
        is_readable = self.action_format.parse(text, self.executor.tools).error is None
        tool = self.action_format.tool_of(text)
        return Attempted(
            Answer(self.action_format.key(text) if is_readable else ""), num_tokens, (tool,) if tool else ()
        )

    async def _episode(self, task: TaskRow, draw: int) -> Attempted:
        config, root = self.cycle.config.synthesize.probe, self.root / task.id / str(draw)
        episode = await first_episode(self.cycle, task, root, self)
        sampler = DrawSampler(AdapterSampler(self.sampler, self.cycle.incumbent), self._seed(task, draw))
        sampling = Sampling(temperature=config.temperature, top_p=config.top_p)
        actor = LiveActor(sampler, self.executor, sampling, action_format=self.action_format)
        try:
            result = await run_episode(episode, actor)
        except ContextOverflowError:
            await asyncio.to_thread(episode.state.discard)
            return Attempted(Answer(""), 0)
        await asyncio.to_thread(result.state.discard)
        called = families.tools_of(result.messages)
        return Attempted(await self._answer(task, result), result.usage.completion_tokens, called)

    def _seed(self, task: TaskRow, draw: int) -> int:
        return derive_seed(self.cycle.seed, "probe", task.slot, draw)

    async def _answer(self, task: TaskRow, result: EpisodeResult) -> Answer:
        if result.outcome != ANSWERED or any(step.failure == "refused" for step in result.steps):
            return Answer("")
        score = None if self.score is None else await self.score(_case(task, result), 0)
        return Answer(same_answer(result.answer), score)


async def drop_settled_and_hopeless(cycle: Cycle, sampler: AnswerSampler, open_tools: OpenTools = open_tools) -> None:
    """Probe the cycle's kept tasks that have no estimate yet, and drop what is always or never solved."""
    config, progress = cycle.config.synthesize, cycle.progress("synthesize")
    left = await asyncio.to_thread(_unprobed, cycle)
    num_tasks, limit = len(left), config.probe.max_tokens
    async with Writer(cycle.store) as writer, _opened(cycle, sampler, open_tools) as probe:

        async def work(task: TaskRow) -> None:
            if limit and progress.counts.get("probe_tokens", 0) >= limit:
                return
            try:
                attempts = await probe.attempts(task)
            except InvalidRequestError as error:  # practice will say so, too, and has a row for it
                logger.info("event=task_not_probed task=%s error=%s", task.id, error)
                return
            estimate = estimate_of([one.answer for one in attempts], config.probe.min_score)
            state = estimate.verdict(config.probe)
            await writer.write(lambda db: _record(db, task, state, estimate, attempts))
            _count(progress, state, estimate, sum(one.tokens for one in attempts))
            progress.say(f"probed {progress.counts['probed']} tasks, {num_tasks} were left when this began")

        await for_each(cycle, left, work, config.concurrency)


def probe_counts(cycle: Cycle) -> Counter[str]:
    """What the probe did so far, to be added to the writer's counts: a task that it dropped is no longer kept."""
    counts: Counter[str] = Counter()
    rows = cycle.store.query(
        "SELECT state, probed_by, COUNT(*) AS n, SUM(probe_tokens) AS tokens FROM tasks "
        "WHERE cycle_id = ? AND probed_by <> '' GROUP BY state, probed_by",
        (cycle.id,),
    )
    for row in rows:
        counts.update({"probed": row["n"], f"probed_by_{row['probed_by']}": row["n"], "probe_tokens": row["tokens"]})
        if row["state"] in (ALWAYS, NEVER):
            counts.update({f"dropped_{row['state']}": row["n"], KEPT: -row["n"]})
    return counts


@asynccontextmanager
async def _opened(cycle: Cycle, sampler: AnswerSampler, open_tools: OpenTools) -> AsyncIterator[Probe]:
    limits = call_limits(cycle.agent)
    num_workers = cycle.config.explore.num_tool_workers
    async with AsyncExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="probe-", dir=cycle.folder))
        opening = open_tools(cycle.app, cycle.app_ref, num_workers=num_workers, limits=limits, purpose="practice")
        yield Probe(
            cycle=cycle,
            sampler=sampler,
            executor=await stack.enter_async_context(opening),
            action_format=await stack.enter_async_context(open_format(cycle.agent)),
            root=Path(root),
            score=await stack.enter_async_context(open_scorer(cycle)) if cycle.app.scorer.function else None,
        )


def _unprobed(cycle: Cycle) -> list[TaskRow]:
    probed = cycle.store.query("SELECT id FROM tasks WHERE cycle_id = ? AND probed_by <> ''", (cycle.id,))
    done = {row["id"] for row in probed}
    return [task for task in tasks_of(cycle.store, cycle.id) if task.state == KEPT and task.id not in done]


def _record(
    db: sqlite3.Connection, task: TaskRow, state: str, estimate: Estimate, attempts: Sequence[Attempted]
) -> None:
    answers = [one.answer.said[:MAX_ANSWER_CHARS] for one in attempts]
    called = {tool for one in attempts for tool in one.tools}
    db.execute(
        "UPDATE tasks SET state = ?, solve_rate = ?, probed_by = ?, probe_answers = ?, probe_tokens = ?, family = ? "
        "WHERE id = ?",
        (
            state, estimate.solve_rate, estimate.by, canonical_json(answers), sum(one.tokens for one in attempts),
            families.family_of(called, task.images, task.files), task.id,
        ),
    )  # fmt: skip


def _count(progress: Progress, state: str, estimate: Estimate, num_tokens: int) -> None:
    dropped = {} if state == KEPT else {f"dropped_{state}": 1, KEPT: -1}
    progress.advance(0, probed=1, probe_tokens=num_tokens, **{f"probed_by_{estimate.by}": 1}, **dropped)


def _case(task: TaskRow, result: EpisodeResult) -> Case:
    """The last step as the scorer sees it in practice."""
    last = result.steps[-1]
    num_before = len(result.messages) - len(last.messages)
    context = Context(task.prompt, task.images, tuple(result.messages[:num_before]))
    view = CandidateView(last.text, observation_of(last.observations))
    return Case(context, {0: view}, {0: Contender(0, 1, 0.0, failed=False)}, _compare_nothing)


async def _compare_nothing(first: int, second: int) -> Verdict:
    raise AssertionError("a scorer looks at one candidate alone")
