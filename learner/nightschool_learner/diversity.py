"""Several sampled answers a task: pass@1, pass@n, and how many different things an adapter tries.

Self-improvement can move mass to what a model can already do now and then (sharpening, arXiv 2412.01951): pass@1
rises, pass@n does not. It can also narrow what the model tries at all: pass@n falls. Greedy success shows neither.
Pure functions over the draws; both adapters draw from the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nightschool_learner.evaluation_results import GREEDY, TaskResult
from nightschool_learner.statistics import Interval, paired_bootstrap

Draws = Sequence[TaskResult]
"""Every sampled result of one task on one adapter."""


@dataclass(frozen=True)
class Spread:
    """One adapter on the sampled tasks."""

    pass_at: tuple[float, ...]
    """pass@k for k = 1, ..., n."""
    distinct_answers: float
    """Different final answers of a task over its draws, mean over tasks."""
    distinct_actions: float
    """Different first steps of a task over its draws, mean over tasks: there all draws stand at the same prompt."""


@dataclass(frozen=True)
class Sampled:
    """Both adapters on the same tasks and seeds."""

    num_tasks: int
    num_draws: int
    temperature: float
    incumbent: Spread
    candidate: Spread
    pass_at_1: Interval
    """Of the difference of pass@1, candidate minus incumbent; whole tasks are resampled."""
    pass_at_n: Interval
    reading: str
    """`learned`, `sharpened`, `narrowed`, `worse` or `unclear`."""


def pass_at_k(n: int, num_solved: int, k: int) -> float:
    """The chance that one of k answers is right, from n answers of which `num_solved` are.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of Chen et al. 2021, arXiv 2107.03374, eq. 1. Needs k <= n.
    """
    if not (0 <= num_solved <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= solved <= n and 1 <= k <= n: {num_solved} solved, n {n}, k {k}")
    return 1 - math.comb(n - num_solved, k) / math.comb(n, k)


def sampled_numbers(
    incumbent: Sequence[TaskResult], candidate: Sequence[TaskResult], *, temperature: float, level: float, seed: int
) -> Sampled | None:
    """The comparison of all sampled draws, None where no task has the same two draws or more on both.

    The intervals are clustered by task: draws of one task are not independent, so tasks are resampled, never draws.
    """
    before, after = _by_task(incumbent), _by_task(candidate)
    ids = sorted(task_id for task_id in before if task_id in after)
    num_draws = min((min(len(before[i]), len(after[i])) for i in ids), default=0)
    if num_draws < 2:
        return None
    old, new = ([by_task[i][:num_draws] for i in ids] for by_task in (before, after))
    intervals = [
        paired_bootstrap(
            [pass_at_k(num_draws, _num_solved(draws), k) for draws in old],
            [pass_at_k(num_draws, _num_solved(draws), k) for draws in new],
            seed=seed + k,
            level=level,
        )
        for k in (1, num_draws)
    ]
    return Sampled(
        num_tasks=len(ids),
        num_draws=num_draws,
        temperature=temperature,
        incumbent=_spread(old, num_draws),
        candidate=_spread(new, num_draws),
        pass_at_1=intervals[0],
        pass_at_n=intervals[1],
        reading=read(*intervals),
    )


def read(pass_at_1: Interval, pass_at_n: Interval) -> str:
    """What the two intervals say together.

    `narrowed`: pass@n surely fell, something that was in reach is lost. `learned`: pass@n surely rose, something new
    is in reach. `sharpened`: pass@1 surely rose, pass@n did not. `worse`: pass@1 surely fell. Else `unclear`.
    """
    if pass_at_n.high < 0:
        return "narrowed"
    if pass_at_n.low > 0:
        return "learned"
    if pass_at_1.low > 0:
        return "sharpened"
    return "worse" if pass_at_1.high < 0 else "unclear"


def _by_task(results: Sequence[TaskResult]) -> dict[str, list[TaskResult]]:
    grouped: dict[str, list[TaskResult]] = {}
    for result in sorted(results, key=lambda r: r.draw):
        if result.draw != GREEDY:
            grouped.setdefault(result.task_id, []).append(result)
    return grouped


def _spread(tasks: Sequence[Draws], n: int) -> Spread:
    return Spread(
        pass_at=tuple(_mean([pass_at_k(n, _num_solved(draws), k) for draws in tasks]) for k in range(1, n + 1)),
        distinct_answers=_mean([_num_distinct(draws, lambda r: " ".join(r.answer.split())) for draws in tasks]),
        distinct_actions=_mean([_num_distinct(draws, lambda r: r.actions[0] if r.actions else "") for draws in tasks]),
    )


def _num_solved(draws: Draws) -> int:
    return sum(draw.success for draw in draws)


def _num_distinct(draws: Draws, what: Callable[[TaskResult], str]) -> float:
    return len({what(draw) for draw in draws})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
