"""Exploration: a rollout for every kept task, many at once, each step of each chosen among n candidates.

Owns the two stages `explore` and `critique`, which advance together, and how a rollout starts, resumes and
ends. A step of a rollout is `practice.py`'s.

Deviations from SPORT: every candidate runs in a fork of the state of its own; equal actions are one candidate;
facts decide before the critic; the critic is asked in both orders and may abstain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nightschool_server.agent.episode import Episode
from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.agent.formats import ActionFormat, open_format
from nightschool_server.agent.limits import call_limits, episode_limits
from nightschool_server.agent.loop import run_episode
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.chat import Message, system, user
from nightschool_server.errors import InvalidRequestError
from nightschool_server.ids import new_id
from nightschool_server.tools.forking import UncopyableError, remove_tree
from nightschool_server.tools.placing import PlacedFile, place_files
from nightschool_server.tools.state import ToolState
from nightschool_server.uninterrupted import uninterrupted

from nightschool_learner import practice_counts, practice_records, records, seed_records
from nightschool_learner.audit import audit_cycle, check_answers
from nightschool_learner.budget import Budget, BudgetSpentError
from nightschool_learner.comparisons import Court
from nightschool_learner.coverage import coverage_of
from nightschool_learner.critic_drift import check_drift
from nightschool_learner.critics import open_critic
from nightschool_learner.critique import Critic
from nightschool_learner.errors import NothingToLearnError
from nightschool_learner.heat import hot_temperature
from nightschool_learner.meter import Meter, MeteredSampler, clocks_of, unseen
from nightschool_learner.panel import Panel
from nightschool_learner.panels import open_panel
from nightschool_learner.parallel import for_each
from nightschool_learner.practice import Practice, PracticeActor, RefusedPickError
from nightschool_learner.practice_records import BUDGET, RolloutRow
from nightschool_learner.sampling import AnswerSampler, PracticeSampler
from nightschool_learner.seed_records import KEPT, TaskRow
from nightschool_learner.stages import Cycle, Ending
from nightschool_learner.writer import Writer

logger = logging.getLogger(__name__)

NO_TIME_LIMIT_S = 7 * 24 * 3600.0
"""A rollout waits for live requests, for a server that is away, for a paused learner: its wall time says nothing."""


@dataclass(frozen=True)
class ExploreStage:
    """Practises every kept task."""

    make_sampler: Callable[[Cycle], AnswerSampler] = PracticeSampler
    open_critic: Callable[[Cycle, AnswerSampler], AbstractAsyncContextManager[Critic]] = open_critic
    open_panel: Callable[[Cycle, AnswerSampler], AbstractAsyncContextManager[Panel]] = open_panel
    open_tools: Callable[..., AbstractAsyncContextManager[ToolExecutor]] = open_tools
    name: str = "explore"

    async def run(self, cycle: Cycle) -> Ending | None:
        config = cycle.config.explore
        config = config.model_copy(update={"hot_temperature": hot_temperature(cycle.store, cycle.id, config)})
        tasks = [task for task in seed_records.tasks_of(cycle.store, cycle.id) if task.state == KEPT]
        rollouts = practice_records.rollouts_of(cycle.store, cycle.id)
        ended = {task_id for task_id, rollout in rollouts.items() if rollout.state != "running"}
        records.start_stage(cycle.store, cycle.id, CritiqueStage.name)
        explored, compared = cycle.progress(self.name), cycle.progress(CritiqueStage.name)
        clocks = clocks_of(records.stage_counts(cycle.store, cycle.id, self.name))
        explored.begin(len(tasks), len(ended), practice_counts.explore_counts(cycle.store, cycle.id) | clocks)
        num_compared = practice_counts.num_critiques(cycle.store, cycle.id)
        compared.begin(0, num_compared, practice_counts.critique_counts(cycle.store, cycle.id))

        workspaces = cycle.folder / "workspaces"
        remove_tree(workspaces)
        num_workers = config.num_tool_workers
        limits = call_limits(cycle.agent)
        opening = self.open_tools(cycle.app, cycle.app_ref, num_workers=num_workers, limits=limits, purpose="practice")
        served = self.make_sampler(cycle)
        read_busy_s = served.engine_busy_s if isinstance(served, PracticeSampler) else unseen
        meter = Meter(explored, cycle.resumed, read_busy_s)
        sampler = MeteredSampler(served, meter)
        budget = Budget(config, explored, meter)
        async with (
            Writer(cycle.store) as writer,
            opening as tools,
            self.open_critic(cycle, sampler) as critic,
            self.open_panel(cycle, sampler) as panel,
            open_format(cycle.agent) as action_format,
        ):
            if ending := await audit_cycle(cycle, critic, panel):
                return ending
            is_listwise = cycle.config.critic.protocol == "listwise"
            practice = Practice(
                cycle_seed=cycle.seed,
                adapter=cycle.incumbent,
                config=config,
                store=cycle.store,
                writer=writer,
                sampler=sampler,
                executor=tools,
                action_format=action_format,
                explored=explored,
                court=Court(cycle.store, writer, critic, panel, compared, is_listwise),
                budget=budget,
            )

            async def practise(task: TaskRow) -> None:
                if task.id in rollouts or not budget.reached():
                    await _rollout(practice, cycle, task, rollouts.get(task.id), workspaces)

            left = [task for task in tasks if task.id not in ended]
            async with meter.running():
                await for_each(cycle, left, practise, config.concurrency)
        _conclude(cycle, budget, len(tasks), config.hot_temperature)
        return None


def _conclude(cycle: Cycle, budget: Budget, num_tasks: int, heat: float) -> None:
    """Say what practice covered. Raises NothingToLearnError where that is too little to train on."""
    explored, coverage = cycle.progress(ExploreStage.name), coverage_of(cycle.store, cycle.id)
    said, rollouts = str(coverage), practice_records.rollouts_of(cycle.store, cycle.id)
    if cycle.config.explore.target_choice_share:
        said += f"; sampled at a hot temperature of {heat:.3g}"
    if reached := budget.reached():
        explored.put(not_begun=num_tasks - len(rollouts))
        said += (
            f"; the budget learner.explore.{reached} was spent: {explored.counts.get(BUDGET, 0)} rollouts ended early, "
            f"{num_tasks - len(rollouts)} of {num_tasks} tasks were not begun"
        )
    explored.say(said)
    if not coverage.num_steps_with_choice:
        raise NothingToLearnError(
            f"in {len(rollouts)} rollouts no step had two different actions: the model repeats itself; "
            f"raise learner.explore.hot_temperature or num_candidates ({said})"
        )
    if coverage.choice_share < cycle.config.explore.min_choice_share:
        raise NothingToLearnError(
            f"{coverage.choice_share:.1%} of {coverage.num_steps} steps had two different actions, fewer than "
            f"learner.explore.min_choice_share = {cycle.config.explore.min_choice_share:g}: there is too little to "
            f"learn from; raise learner.explore.hot_temperature or num_candidates, or give harder seeds ({said})"
        )


class CritiqueStage:
    """Closes the row that explore filled, and stops a cycle whose critic answered in a way that nobody can use."""

    name = "critique"

    async def run(self, cycle: Cycle) -> Ending | None:
        num_compared = practice_counts.num_critiques(cycle.store, cycle.id)
        counts = practice_counts.critique_counts(cycle.store, cycle.id)
        progress = cycle.progress(self.name)
        progress.begin(num_compared, num_compared, counts)
        return check_answers(cycle) or check_drift(cycle, progress)


async def _rollout(practice: Practice, cycle: Cycle, task: TaskRow, known: RolloutRow | None, workspaces: Path) -> None:
    """Run or resume the rollout of one task, to its end."""
    rollout = known or RolloutRow(new_id("roll"), task.id, "running")
    if known is None:
        await practice.writer.write(lambda db: practice_records.start_rollout(db, cycle.id, rollout, practice.adapter))
    root = workspaces / rollout.id
    state, outcome, answer = "done", "", ""
    try:
        episode = await first_episode(cycle, task, root, practice)
        result = await run_episode(episode, PracticeActor(practice, task, rollout.id))
        outcome, answer = result.outcome, result.answer
    except RefusedPickError:
        outcome = "refused"
    except BudgetSpentError:
        outcome = BUDGET
    except InvalidRequestError as error:  # the boundary of a rollout: a task that the engine will not take
        state, outcome = "failed", f"invalid_{error.field}"
    except UncopyableError as error:
        logger.warning("event=rollout_failed rollout=%s reason=%r", rollout.id, str(error))
        state, outcome = "failed", "uncopyable_workspace"
    finally:
        await uninterrupted(asyncio.to_thread(remove_tree, root))
    await practice.writer.write(lambda db: practice_records.end_rollout(db, rollout.id, state, outcome, answer))
    practice.explored.advance(1, **{outcome: 1})


class Setting(Protocol):
    """With what an episode begins."""

    @property
    def executor(self) -> ToolExecutor: ...
    @property
    def action_format(self) -> ActionFormat: ...


async def first_episode(cycle: Cycle, task: TaskRow, root: Path, setting: Setting) -> Episode:
    """The episode in which a task begins, as a live one would. Writes the task's files to the disk, below `root`.

    A cancellation waits for that: whoever removes `root` then removes all of it. Raises InvalidRequestError where the
    bytes of a file are gone.
    """
    return await uninterrupted(asyncio.to_thread(_first_episode, cycle, task, root, setting))


def _first_episode(cycle: Cycle, task: TaskRow, root: Path, setting: Setting) -> Episode:
    app, config = cycle.app, cycle.config.explore
    head: tuple[Message, ...] = (system(app.system_prompt),) if app.system_prompt else ()
    limits = episode_limits(
        cycle.agent,
        max_steps=config.max_steps or app.max_steps,
        max_step_tokens=config.max_tokens,
        max_tokens=config.max_tokens * (config.max_steps or app.max_steps),
        max_time_s=NO_TIME_LIMIT_S,
    )
    asked = (*head, user(task.prompt, task.images, task.files))
    messages = setting.action_format.begin(asked, setting.executor.tools)
    files = [PlacedFile(file, cycle.store.blob_path(file.sha256)) for file in task.files]
    try:
        state = place_files(ToolState.initial(app, root), files)
    except FileNotFoundError as error:
        raise InvalidRequestError("files", f"a file of task {task.id} is gone: {error}") from error
    return Episode(messages, state, limits)
