"""The evaluate stage: candidate and incumbent answer the same held-out tasks, through the server.

The loop, the tools and the limits are those of a live task. Every task is answered greedily, some are sampled as well,
both adapters from the same seeds; so a result depends on (basis, adapter, task, draw) alone and is measured once: a
resumed cycle goes on where it stopped, and the incumbent's results of an earlier cycle count. Both adapters are
interleaved, so that whatever the machine does meanwhile falls on both alike. Requests are PRACTICE (they wait for
live ones) and NO_LOG (held-out tasks never become seeds); pictures travel as bytes and are not kept.

Owns the units of work; one answer is `examiner.py`, what the numbers mean `gate.py`, who is promoted `promote.py`.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from nightschool_server.agent.limits import call_limits
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.app import EvaluationTask, load_evaluation
from nightschool_server.errors import AppError
from nightschool_server.evaluation_set import EvaluationSet

from nightschool_learner import evaluation_sets, records
from nightschool_learner.evaluation_results import GREEDY, Basis, TaskResult, insert_results, results_of
from nightschool_learner.examiner import Examiner
from nightschool_learner.parallel import for_each
from nightschool_learner.sampling import PracticeSampler, patiently
from nightschool_learner.stages import Cycle, Ending, Progress
from nightschool_learner.statistics import minimum_detectable_difference

logger = logging.getLogger(__name__)

BATCH = 16
"""Results written in one transaction; a crash costs at most so many tasks anew."""

EXPECTED_DISCORDANT = 0.25
"""Share of tasks on which two adapters are expected to differ where no evaluation on this set says more."""


@dataclass(frozen=True)
class Unit:
    """A held-out task, which of its answers, and the adapter that gives it."""

    task: EvaluationTask
    draw: int
    adapter: str


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
        basis = await basis_of(cycle, held_out)
        results = Results(cycle, basis, cycle.progress(self.name), (candidate, cycle.incumbent))
        units = await asyncio.to_thread(results.begin, held_out)
        if units:
            await _measure(cycle, units, results)
        return None


async def _measure(cycle: Cycle, units: list[Unit], results: Results) -> None:
    config = cycle.config.evaluate
    with tempfile.TemporaryDirectory(prefix="evaluate-", dir=cycle.folder) as root:
        opening = open_tools(
            cycle.app,
            cycle.app_ref,
            num_workers=config.num_tool_workers,
            limits=call_limits(cycle.agent),
            purpose="practice",
        )
        async with opening as tools:
            examiner = Examiner(cycle, PracticeSampler(cycle), tools, Path(root), results.basis.set_digest)

            async def work(unit: Unit) -> None:
                await results.add(unit.adapter, await examiner.examine(unit.task, unit.adapter, unit.draw))

            try:
                await for_each(cycle, units, work, config.concurrency)
            finally:
                await results.flush()


def held_out_tasks(cycle: Cycle) -> EvaluationSet:
    """The application's held-out tasks, cut to `evaluate.max_tasks`. Raises AppError where there are none."""
    held_out = load_evaluation(cycle.app)
    limit = cycle.config.evaluate.max_tasks
    if not limit:
        return held_out
    return EvaluationSet(tuple(sorted(held_out.tasks, key=lambda task: task.id)[:limit]), held_out.digest)


async def basis_of(cycle: Cycle, held_out: EvaluationSet) -> Basis:
    """What the cycle's results rest on: the set, the model that serves now, the application, the limits."""
    status = await patiently(cycle, cycle.client.admin.status)
    protocol = evaluation_sets.protocol_of(cycle, status.base_model_digest)
    return Basis(held_out.digest, protocol)


def sampled_tasks(cycle: Cycle, held_out: EvaluationSet) -> list[EvaluationTask]:
    """The tasks that are sampled: the first of every family by id, then the second of each, up to the limit."""
    limit = cycle.config.evaluate.max_sampled_tasks or len(held_out.tasks)
    seen: dict[str, int] = {}
    ranked: list[tuple[int, str, EvaluationTask]] = []
    for task in sorted(held_out.tasks, key=lambda task: task.id):
        seen[task.family] = seen.get(task.family, 0) + 1
        ranked.append((seen[task.family], task.family, task))
    return [task for _, _, task in sorted(ranked, key=lambda each: each[:2])[:limit]]


def draws_of(cycle: Cycle, held_out: EvaluationSet) -> list[tuple[EvaluationTask, int]]:
    """Every task with its greedy draw, then the sampled draws."""
    greedy = [(task, GREEDY) for task in held_out.tasks]
    sampled = sampled_tasks(cycle, held_out) if cycle.config.evaluate.num_seeds else []
    return greedy + [(task, draw) for task in sampled for draw in range(1, cycle.config.evaluate.num_seeds + 1)]


@dataclass
class Results:
    """Results on their way to their rows, and to the progress that operators see."""

    cycle: Cycle
    basis: Basis
    progress: Progress
    adapters: tuple[str, str]
    """Candidate and incumbent."""
    _pending: list[tuple[str, TaskResult]] = field(default_factory=list)
    _solved: dict[str, list[bool]] = field(default_factory=dict)
    _power: str = ""

    def begin(self, held_out: EvaluationSet) -> list[Unit]:
        """What is left to measure, both adapters interleaved; progress starts at what is known."""
        store, names = self.cycle.store, tuple(dict.fromkeys(self.adapters))
        evaluation_sets.register(store, self.cycle.app.name, load_evaluation(self.cycle.app))
        known = {name: results_of(store, self.basis, name) for name in names}
        draws = draws_of(self.cycle, held_out)
        units = [Unit(task, draw, name) for task, draw in draws for name in names if (task.id, draw) not in known[name]]
        ids = {task.id for task in held_out.tasks}
        for name in names:
            self._solved[name] = [known[name][id_, GREEDY].success for id_ in ids if (id_, GREEDY) in known[name]]
        num_total = len(names) * len(draws)
        self._announce(len(held_out.tasks), num_total, num_total - len(units))
        return units

    def _announce(self, n: int, num_total: int, num_known: int) -> None:
        """What the run can find at all, before it begins."""
        discordant = evaluation_sets.discordant_share(self.cycle.store, self.basis) or EXPECTED_DISCORDANT
        detectable = minimum_detectable_difference(n, discordant)
        self._power = f"n {n} finds differences of {detectable * 100:.1f} points or more"
        counts = {"reused": num_known, "tasks": n, "detectable_per_mille": round(detectable * 1000)}
        self.progress.begin(num_total, num_known, counts)
        self.progress.say(self._power)
        logger.info(
            "event=evaluation_begins cycle=%s n=%d discordant=%.3f detectable=%.4f units=%d reused=%d",
            self.cycle.id, n, discordant, detectable, num_total, num_known,
        )  # fmt: skip

    async def add(self, adapter: str, result: TaskResult) -> None:
        """Take one result; written with the next batch."""
        self._pending.append((adapter, result))
        if result.draw == GREEDY:
            self._solved[adapter].append(result.success)
        rates = [f"{name} {sum(s) / len(s):.1%} of {len(s)}" for name, s in self._solved.items() if s]
        self.progress.message = "; ".join([", ".join(rates), self._power])
        self.progress.advance(1, tool_errors=result.num_tool_errors, completion_tokens=result.completion_tokens)
        if len(self._pending) >= BATCH:
            await self.flush()

    async def flush(self) -> None:
        """Write what is pending."""
        batch, self._pending = self._pending, []
        if batch:
            await asyncio.to_thread(insert_results, self.cycle.store, self.basis, self.cycle.id, batch)
