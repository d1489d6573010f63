"""Which held-out tasks a cycle measures, in which order, how often each, and what the results rest on.

The same for every call of one cycle: evaluation, its early stop and the decision must see one plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from nightschool_server.app import EvaluationTask, load_evaluation
from nightschool_server.evaluation_set import EvaluationSet

from nightschool_learner import evaluation_sets
from nightschool_learner.evaluation_results import GREEDY, Basis, Key
from nightschool_learner.sampling import derive_seed, patiently
from nightschool_learner.sequential import looks
from nightschool_learner.stages import Cycle
from nightschool_learner.statistics import minimum_detectable_difference

EXPECTED_DISCORDANT = 0.25
"""Share of tasks on which two adapters are expected to differ where no evaluation on this set says more."""


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


@dataclass(frozen=True)
class Plan:
    """What a cycle measures of its held-out tasks."""

    tasks: tuple[EvaluationTask, ...]
    """In the order in which they are measured."""
    sampled: frozenset[str]
    """Ids of the tasks that are answered several times."""
    num_seeds: int
    is_judged: bool
    """Whether a judge compares the answers, because the tasks have none of their own."""
    looks: tuple[int, ...]
    """After how many tasks somebody looks whether it is decided; the last is all of them."""

    @property
    def n(self) -> int:
        return len(self.tasks)

    def greedy(self, n: int) -> list[Key]:
        """The greedy draws of the first n tasks."""
        return [(task.id, GREEDY) for task in self.tasks[:n]]

    def keys(self, n: int) -> list[Key]:
        """Every draw of the first n tasks, the greedy ones first."""
        drawn = [(task.id, draw) for task in self.tasks[:n] for draw in self._draws if task.id in self.sampled]
        return self.greedy(n) + drawn

    @property
    def _draws(self) -> range:
        return range(GREEDY + 1, GREEDY + 1 + self.num_seeds)


def plan_of(cycle: Cycle, held_out: EvaluationSet) -> Plan:
    """The cycle's plan. An early stop judges a prefix, so the order is then drawn: a prefix must be a random sample."""
    limits, n = cycle.config.gate, len(held_out.tasks)
    tasks = list(held_out.tasks)
    if limits.early_stop:
        tasks.sort(key=lambda task: derive_seed(cycle.seed, "order", task.id))
    return Plan(
        tuple(tasks),
        frozenset(task.id for task in _sampled(held_out, cycle.config.evaluate.max_sampled_tasks)),
        # Without a right answer there is no pass@n.
        0 if held_out.is_judged else cycle.config.evaluate.num_seeds,
        held_out.is_judged,
        tuple(looks(n, limits.first_look, limits.look_every)) if limits.early_stop else (n,),
    )


def _sampled(held_out: EvaluationSet, limit: int) -> list[EvaluationTask]:
    """The first task of every family by id, then the second of each, up to the limit."""
    seen: dict[str, int] = {}
    ranked: list[tuple[int, str, EvaluationTask]] = []
    for task in sorted(held_out.tasks, key=lambda task: task.id):
        seen[task.family] = seen.get(task.family, 0) + 1
        ranked.append((seen[task.family], task.family, task))
    return [task for _, _, task in sorted(ranked, key=lambda each: each[:2])[: limit or None]]


@dataclass(frozen=True)
class Power:
    """What a run can find, worked out before it begins."""

    discordant: float
    """The share of tasks on which two adapters are expected to differ."""
    detectable: float
    """The true difference that is found in 8 of 10 runs at `gate.max_p`."""


def power_of(cycle: Cycle, basis: Basis, n: int) -> Power:
    """From the last evaluation on this basis, or `EXPECTED_DISCORDANT` where there is none."""
    discordant = evaluation_sets.discordant_share(cycle.store, basis) or EXPECTED_DISCORDANT
    return Power(discordant, minimum_detectable_difference(n, discordant, alpha=cycle.config.gate.max_p))
