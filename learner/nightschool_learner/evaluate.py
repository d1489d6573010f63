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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from nightschool_server.agent.formats import open_format
from nightschool_server.agent.limits import call_limits
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.app import load_evaluation
from nightschool_server.errors import AppError
from nightschool_server.uninterrupted import uninterrupted

from nightschool_learner import evaluation_sets, records
from nightschool_learner.evaluation_results import Basis, Key, TaskResult, insert_results, results_of
from nightschool_learner.evidence import Measured, look_at
from nightschool_learner.examiner import Examiner
from nightschool_learner.held_out import Plan, basis_of, held_out_tasks, plan_of, power_of
from nightschool_learner.judge import Judging, judge_fault, open_judge
from nightschool_learner.parallel import for_each
from nightschool_learner.sampling import PracticeSampler
from nightschool_learner.stages import Cycle, Ending, Progress

logger = logging.getLogger(__name__)

BATCH = 16
"""Results written in one transaction; a crash costs at most so many tasks anew."""

Unit = tuple[Key, str]
"""A draw of a held-out task, and the adapter that answers it."""

Measure = Callable[[Sequence[Key]], Awaitable[None]]
"""Measures what is not known yet of these draws, on both adapters."""


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
        if held_out.is_judged and (fault := judge_fault(cycle)):
            return Ending("stopped", fault)
        basis, plan = await basis_of(cycle, held_out), plan_of(cycle, held_out)
        results = Results(cycle, basis, plan, cycle.progress(self.name), (candidate, cycle.incumbent))
        await asyncio.to_thread(results.begin)
        if results.missing(plan.keys(plan.n)) or plan.is_judged:
            await _examine(cycle, results)
        return None


async def _examine(cycle: Cycle, results: Results) -> None:
    config = cycle.config.evaluate
    tasks = {task.id: task for task in results.plan.tasks}
    with tempfile.TemporaryDirectory(prefix="evaluate-", dir=cycle.folder) as root:
        opening = open_tools(
            cycle.app,
            cycle.app_ref,
            num_workers=config.num_tool_workers,
            limits=call_limits(cycle.agent),
            purpose="practice",
        )
        async with opening as tools, open_format(cycle.agent) as action_format, _judging(cycle, results) as judging:
            sampler, digest = PracticeSampler(cycle), results.basis.set_digest
            examiner = Examiner(cycle, sampler, tools, Path(root), digest, action_format)

            async def work(unit: Unit) -> None:
                (task_id, draw), adapter = unit
                await results.add(adapter, await examiner.examine(tasks[task_id], adapter, draw))

            async def measure(keys: Sequence[Key]) -> None:
                try:
                    await for_each(cycle, results.missing(keys), work, config.concurrency)
                finally:
                    await results.flush()
                if judging is not None:
                    await judging.judge([tasks[task_id] for task_id, _ in keys])

            await _until_decided(results, measure)


@asynccontextmanager
async def _judging(cycle: Cycle, results: Results) -> AsyncIterator[Judging | None]:
    """The judge, where the tasks need one."""
    if not results.plan.is_judged:
        yield None
        return
    async with open_judge(cycle, PracticeSampler(cycle)) as critic:
        yield Judging(cycle, results.basis, results.adapters[0], critic)


async def _until_decided(results: Results, measure: Measure) -> None:
    """Measure up to the end, or up to the look at which the outcome is sure."""
    plan = results.plan
    for number, n in enumerate(plan.looks[:-1], start=1):
        await measure(plan.greedy(n))
        stop = await asyncio.to_thread(look_at, results.cycle, results.basis, plan, results.measured, number)
        if stop is not None:
            if stop.verdict == "accepted":
                await measure(plan.keys(n))
            results.stop(n, stop.verdict)
            return
    await measure(plan.keys(plan.n))


@dataclass
class Results:
    """Results on their way to their rows, and to the progress that operators see."""

    cycle: Cycle
    basis: Basis
    plan: Plan
    progress: Progress
    adapters: tuple[str, str]
    """Candidate and incumbent."""
    _known: dict[str, dict[Key, TaskResult]] = field(default_factory=dict)
    _pending: list[tuple[str, TaskResult]] = field(default_factory=list)
    _power: str = ""

    @property
    def measured(self) -> Measured:
        """All that is known by now."""
        candidate, incumbent = self.adapters
        return Measured(self._known[incumbent], self._known[candidate])

    def begin(self) -> None:
        """Read what is known, and say what the run can find at all, before it begins."""
        store, plan = self.cycle.store, self.plan
        evaluation_sets.register(store, self.cycle.app.name, load_evaluation(self.cycle.app))
        self._known = {name: results_of(store, self.basis, name) for name in self.adapters}
        num_total = len(self._known) * len(plan.keys(plan.n))
        num_known = num_total - len(self.missing(plan.keys(plan.n)))
        power = power_of(self.cycle, self.basis, plan.n)
        self._power = f"n {plan.n} finds differences of {power.detectable * 100:.1f} points or more in 8 of 10 runs"
        counts = {"reused": num_known, "tasks": plan.n, "detectable_per_mille": round(power.detectable * 1000)}
        self.progress.begin(num_total, num_known, counts)
        self.progress.say(self._power)
        logger.info(
            "event=evaluation_begins cycle=%s n=%d discordant=%.3f detectable=%.4f units=%d reused=%d",
            self.cycle.id, plan.n, power.discordant, power.detectable, num_total, num_known,
        )  # fmt: skip

    def missing(self, keys: Sequence[Key]) -> list[Unit]:
        """What is left to measure of these draws, both adapters interleaved."""
        return [(key, name) for key in keys for name in self._known if key not in self._known[name]]

    async def add(self, adapter: str, result: TaskResult) -> None:
        """Take one result; written with the next batch."""
        self._pending.append((adapter, result))
        self._known[adapter][result.key] = replace(result, turns=())  # the rows keep those
        self.progress.message = "; ".join([", ".join(self._rates()), self._power])
        self.progress.advance(1, tool_errors=result.num_tool_errors, completion_tokens=result.completion_tokens)
        if len(self._pending) >= BATCH:
            await self.flush()

    async def flush(self) -> None:
        """Write what is pending; a cancellation waits for that."""
        batch, self._pending = self._pending, []
        if batch:
            await uninterrupted(asyncio.to_thread(insert_results, self.cycle.store, self.basis, self.cycle.id, batch))

    def stop(self, n: int, verdict: str) -> None:
        """Say that the rest need not be measured."""
        self.progress.num_total = self.progress.num_done
        self.progress.message = f"{verdict} after {n} of {self.plan.n} tasks: {', '.join(self._rates())}"
        self.progress.flush()

    def _rates(self) -> list[str]:
        """Success of each adapter on what is planned."""
        rates = []
        for name, known in self._known.items():
            solved = [known[key].success for key in self.plan.greedy(self.plan.n) if key in known]
            if solved:
                rates.append(f"{name} {sum(solved) / len(solved):.1%} of {len(solved)}")
        return rates
