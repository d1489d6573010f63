"""pass@n and diversity: the estimator against brute force, and the readings on adapters made to deserve them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from nightschool_learner.diversity import Sampled, pass_at_k, read, sampled_numbers
from nightschool_learner.evaluation_results import GREEDY, TaskResult
from nightschool_learner.statistics import Interval


@pytest.mark.parametrize(("n", "solved"), [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one(n: int, solved: int) -> None:
    answers = [i < solved for i in range(n)]
    for k in range(1, n + 1):
        choices = list(itertools.combinations(answers, k))
        assert pass_at_k(n, solved, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_unbiased() -> None:
    rng, rate, n, k = random.Random(4), 0.3, 6, 3
    estimates = [pass_at_k(n, sum(rng.random() < rate for _ in range(n)), k) for _ in range(20_000)]
    assert sum(estimates) / len(estimates) == pytest.approx(1 - (1 - rate) ** k, abs=0.01)


def test_pass_at_k_refuses_more_answers_than_there_are() -> None:
    with pytest.raises(ValueError, match="n 4, k 5"):
        pass_at_k(4, 2, 5)


def draws(
    solved: Callable[[int, int], bool], action: Callable[[int, int], str], num_tasks: int = 120
) -> list[TaskResult]:
    """Four draws a task, and the greedy one, which must not count."""
    return [
        TaskResult(
            f"t{task}", "f", draw != GREEDY and solved(task, draw), action(task, draw), "answered", 1, 0, 9, draw=draw,
            actions=(action(task, draw),),
        )
        for task in range(num_tasks)
        for draw in range(5)
    ]  # fmt: skip


def numbers(before: list[TaskResult], after: list[TaskResult]) -> Sampled:
    found = sampled_numbers(before, after, temperature=1.0, level=0.95, seed=3)
    assert found is not None
    return found


def now_and_then(task: int, draw: int) -> bool:
    """One draw of four is right, on every second task."""
    return task % 2 == 0 and draw == 1 + task // 2 % 4


def test_an_adapter_that_does_always_what_it_did_now_and_then_is_sharpened() -> None:
    after = draws(lambda task, draw: task % 2 == 0, lambda task, draw: "same")
    found = numbers(draws(now_and_then, lambda task, draw: f"a{draw}"), after)
    assert found.reading == "sharpened"
    assert (found.incumbent.pass_at[0], found.candidate.pass_at[0]) == pytest.approx((0.125, 0.5))
    assert (found.incumbent.pass_at[-1], found.candidate.pass_at[-1]) == pytest.approx((0.5, 0.5))
    assert (found.incumbent.distinct_actions, found.candidate.distinct_actions) == (4.0, 1.0)
    assert (found.num_tasks, found.num_draws) == (120, 4)


def test_an_adapter_that_gave_up_what_it_did_now_and_then_is_narrowed_even_where_pass_at_1_rose() -> None:
    after = draws(lambda task, draw: task % 4 == 0, lambda task, draw: "same")
    found = numbers(draws(now_and_then, lambda task, draw: f"a{draw}"), after)
    assert found.candidate.pass_at[0] > found.incumbent.pass_at[0]
    assert found.reading == "narrowed"
    assert found.pass_at_n.high < 0


def test_an_adapter_that_solves_new_tasks_has_learned() -> None:
    after = draws(lambda task, draw: task % 4 != 3, lambda task, draw: f"a{draw}")
    assert numbers(draws(now_and_then, lambda task, draw: f"a{draw}"), after).reading == "learned"


def test_equal_adapters_leave_it_open_and_a_plain_loss_is_said() -> None:
    same = draws(now_and_then, lambda task, draw: f"a{draw}")
    assert numbers(same, same).reading == "unclear"
    assert read(Interval(-0.2, -0.1, 0.95), Interval(-0.1, 0.1, 0.95)) == "worse"


def test_one_draw_says_nothing_of_diversity() -> None:
    one = [result for result in draws(now_and_then, lambda task, draw: "a") if result.draw <= 1]
    assert sampled_numbers(one, one, temperature=1.0, level=0.95, seed=1) is None
    assert sampled_numbers([], [], temperature=1.0, level=0.95, seed=1) is None


def test_the_interval_is_clustered_by_task() -> None:
    """Four equal draws of a task are one observation: the interval is as wide as with one draw, not half as wide."""
    rng = random.Random(1)
    luck = [rng.random() < 0.5 for _ in range(240)]
    before = draws(lambda task, draw: luck[task], lambda task, draw: "a")
    after = draws(lambda task, draw: luck[120 + task], lambda task, draw: "a")
    interval = numbers(before, after).pass_at_1
    spread = (0.5 / 120) ** 0.5
    assert (interval.high - interval.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.15)
