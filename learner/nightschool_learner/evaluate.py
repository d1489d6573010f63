"""The evaluate stage: candidate and incumbent answer the same held-out tasks, through the server.

The loop, the tools and the limits are those of a live task; decoding is greedy, so a result depends on
(set, adapter, task) alone and is measured once: a resumed cycle goes on where it stopped, and the incumbent's
results of an earlier cycle count. Both adapters are interleaved, so that whatever the machine does meanwhile
falls on both alike. Requests are PRACTICE (they wait for live ones) and NO_LOG (held-out tasks never become
seeds); pictures travel as bytes and are not kept.

Owns the units of work; what the numbers mean is `gate.py`, who is promoted is `promote.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from nightschool_server import chat
from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.agent.formats import action_format
from nightschool_server.agent.loop import Episode, EpisodeResult, Limits, LiveActor, run_episode
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.app import EvaluationTask, is_correct, load_evaluation
from nightschool_server.config.training import EvaluateConfig
from nightschool_server.engine import Sampling
from nightschool_server.errors import AppError, ContextOverflowError
from nightschool_server.evaluation_set import EvaluationSet
from nightschool_server.tools.state import ToolState

from nightschool_learner import records
from nightschool_learner.evaluation_records import TaskResult, insert_results, results_of
from nightschool_learner.parallel import for_each
from nightschool_learner.sampling import AdapterSampler, PracticeSampler
from nightschool_learner.stages import Cycle, Ending, Progress
from nightschool_learner.statistics import minimum_detectable_difference

MAX_TASK_S = 3600.0
"""Wall time of one task: generous, because practice waits for live requests and a slow machine is no failure."""

BATCH = 16
"""Results written in one transaction; a crash costs at most so many tasks anew."""

EXPECTED_DISCORDANT = 0.25
"""Share of tasks on which two adapters are expected to differ, for the detectable difference shown beforehand."""

OVERFLOW = "context_overflow"
"""Outcome of a task that does not fit the model's context at all."""

Unit = tuple[EvaluationTask, str]
"""A held-out task and the adapter that answers it."""


class EvaluateStage:
    """Measures candidate and incumbent on the application's held-out tasks."""

    name = "evaluate"

    async def run(self, cycle: Cycle) -> Ending | None:
        try:
            held_out = await asyncio.to_thread(held_out_tasks, cycle)
        except AppError as error:
            return Ending("stopped", f"nothing can be proven without held-out tasks: {error}")
        candidate = records.candidate_of(cycle.store, cycle.id)
        assert candidate is not None, "the train stage registers a candidate"
        results = Results(cycle, held_out.digest, cycle.progress(self.name), (candidate, cycle.incumbent))
        units = await asyncio.to_thread(results.begin, held_out)
        if not units:
            return None
        config = cycle.config.evaluate
        with tempfile.TemporaryDirectory(prefix="evaluate-", dir=cycle.folder) as root:
            opening = open_tools(cycle.app, cycle.app_ref, num_workers=config.num_tool_workers, purpose="practice")
            async with opening as tools:
                examiner = Examiner(cycle, config, tools, Path(root))

                async def work(unit: Unit) -> None:
                    task, adapter = unit
                    await results.add(adapter, await examiner.examine(task, adapter))

                try:
                    await for_each(cycle, units, work, config.concurrency)
                finally:
                    await results.flush()
        return None


def held_out_tasks(cycle: Cycle) -> EvaluationSet:
    """The application's held-out tasks, cut to `evaluate.max_tasks`. Raises AppError where there are none."""
    held_out = load_evaluation(cycle.app)
    limit = cycle.config.evaluate.max_tasks
    if not limit:
        return held_out
    return EvaluationSet(tuple(sorted(held_out.tasks, key=lambda task: task.id)[:limit]), held_out.digest)


@dataclass
class Results:
    """Results on their way to their rows, and to the progress that operators see."""

    cycle: Cycle
    set_digest: str
    progress: Progress
    adapters: tuple[str, str]
    """Candidate and incumbent."""
    _pending: list[tuple[str, TaskResult]] = field(default_factory=list)
    _solved: dict[str, list[bool]] = field(default_factory=dict)

    def begin(self, held_out: EvaluationSet) -> list[Unit]:
        """What is left to measure, both adapters interleaved; progress starts at what is known."""
        units: list[Unit] = []
        known = {adapter: results_of(self.cycle.store, self.set_digest, adapter) for adapter in self.adapters}
        names = tuple(dict.fromkeys(self.adapters))
        for task in held_out.tasks:
            units.extend((task, adapter) for adapter in names if task.id not in known[adapter])
        for adapter in names:
            ids = {task.id for task in held_out.tasks}
            self._solved[adapter] = [r.success for r in known[adapter].values() if r.task_id in ids]
        num_total = len(names) * len(held_out.tasks)
        self.progress.begin(num_total, num_total - len(units), {"reused": num_total - len(units)})
        detectable = minimum_detectable_difference(len(held_out.tasks), EXPECTED_DISCORDANT)
        self.progress.say(f"n {len(held_out.tasks)}: finds differences of {detectable * 100:.1f} points or more")
        return units

    async def add(self, adapter: str, result: TaskResult) -> None:
        """Take one result; written with the next batch."""
        self._pending.append((adapter, result))
        self._solved[adapter].append(result.success)
        self.progress.message = ", ".join(
            f"{adapter} {sum(solved) / len(solved):.1%} of {len(solved)}"
            for adapter, solved in self._solved.items()
            if solved
        )
        counts = {"tool_errors": result.num_tool_errors, "completion_tokens": result.completion_tokens}
        self.progress.advance(1, **counts, **({"simulated": result.num_simulated} if result.num_simulated else {}))
        if len(self._pending) >= BATCH:
            await self.flush()

    async def flush(self) -> None:
        """Write what is pending."""
        batch, self._pending = self._pending, []
        if batch:
            await asyncio.to_thread(insert_results, self.cycle.store, self.set_digest, self.cycle.id, batch)


@dataclass(frozen=True)
class Examiner:
    """Puts held-out tasks to an adapter."""

    cycle: Cycle
    config: EvaluateConfig
    executor: ToolExecutor
    root: Path
    """Where tools' workspaces are made."""

    async def examine(self, task: EvaluationTask, adapter: str) -> TaskResult:
        """One held-out task on one adapter, from the prompt to the verdict."""
        images = await asyncio.to_thread(read_images, task)
        app = self.cycle.app
        state = ToolState.initial(app, self.root)
        limits = Limits(
            app.max_steps,
            self.config.max_tokens,
            self.config.max_task_tokens,
            MAX_TASK_S,
            self.cycle.agent.max_malformed_steps,
        )
        written = action_format(self.cycle.agent)
        head = (chat.system(app.system_prompt), chat.user(task.prompt, list(images)))
        messages = written.begin(head, self.executor.tools)
        sampler = AdapterSampler(PracticeSampler(self.cycle), adapter)
        actor = LiveActor(sampler, self.executor, Sampling(temperature=0.0), action_format=written)
        try:
            result = await run_episode(
                Episode(written.begin(messages, self.executor.tools), state, limits, images), actor
            )
        except ContextOverflowError as error:
            return TaskResult(task.id, task.family, False, str(error), OVERFLOW, 0, 0, 0)
        await asyncio.to_thread(result.state.discard)
        return judge(task, result)


def judge(task: EvaluationTask, result: EpisodeResult) -> TaskResult:
    """The verdict on an episode: solved where it ended with a right final answer."""
    return TaskResult(
        task_id=task.id,
        family=task.family,
        success=result.outcome == "answered" and is_correct(task, result.answer),
        answer=result.answer,
        outcome=result.outcome,
        num_steps=result.num_steps,
        num_tool_errors=result.num_tool_errors,
        completion_tokens=result.usage.completion_tokens,
        num_simulated=result.num_simulated,
    )


def read_images(task: EvaluationTask) -> dict[str, bytes]:
    """The task's images by sha256, in order."""
    data = [path.read_bytes() for path in task.images]
    return {hashlib.sha256(each).hexdigest(): each for each in data}
