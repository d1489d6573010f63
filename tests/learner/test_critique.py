"""The critic must earn its vote: `choose` with verdicts made by hand at the Critic seam."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from nightschool_learner.critique import Choice, Contender, Duel, Meet, Verdict, choose, in_both_orders

MARGIN = 1.0


class FakeCritic:
    """Answers from a function of two positions and remembers what it was asked."""

    def __init__(self, margin: Callable[[int, int], float | None]) -> None:
        self.margin = margin
        self.asked: list[tuple[int, int]] = []

    async def compare(self, first: int, second: int) -> Verdict:
        self.asked.append((first, second))
        margin = self.margin(first, second)
        if margin is None:
            return Verdict("invalid", 0.0, "C", 10)
        return Verdict("first" if margin > 0 else "second", margin, "A" if margin > 0 else "B", 10)


def ranking(*quality: float) -> FakeCritic:
    """A critic that prefers the candidate of higher quality, by the difference, in either order."""
    return FakeCritic(lambda a, b: quality[a] - quality[b])


def duels(critic: FakeCritic) -> Meet:
    """Duels that the critic alone decides."""

    async def meet(a: int, b: int) -> Duel:
        return await in_both_orders(a, b, critic.compare, MARGIN)

    return meet


def contenders(*num_samples: int, failed: tuple[int, ...] = ()) -> list[Contender]:
    return [Contender(i, n, logprob=-float(i), failed=i in failed) for i, n in enumerate(num_samples)]


async def test_the_pick_beats_every_rival_in_both_orders() -> None:
    critic = ranking(0.0, 5.0, 2.0, 7.0)
    choice = await choose(contenders(2, 1, 1, 1), duels(critic))
    assert choice == Choice(3, "critic")
    assert {(3, rival) for rival in (0, 1, 2)} | {(rival, 3) for rival in (0, 1, 2)} <= set(critic.asked)


async def test_a_sure_pick_costs_few_comparisons_and_none_twice() -> None:
    critic = ranking(9.0, 5.0, 2.0, 7.0, 0.0)
    await choose(contenders(1, 1, 1, 1, 1), duels(critic))
    assert len(critic.asked) == len(set(critic.asked)) == 8


@pytest.mark.parametrize("always", [3.0, -3.0])
async def test_a_critic_that_prefers_a_position_abstains(always: float) -> None:
    critic = FakeCritic(lambda a, b: always)
    assert await choose(contenders(1, 2), duels(critic)) == Choice(1, "fallback", "disagreement")


async def test_a_margin_below_the_bound_abstains_and_the_second_order_is_not_paid_for() -> None:
    critic = FakeCritic(lambda a, b: 0.9 if a == 0 else -0.9)
    assert await choose(contenders(1, 1), duels(critic)) == Choice(0, "fallback", "margin")
    assert critic.asked == [(0, 1)]


async def test_an_answer_that_cannot_be_read_is_no_preference() -> None:
    critic = FakeCritic(lambda a, b: None)
    assert await choose(contenders(1, 3), duels(critic)) == Choice(1, "fallback", "malformed")


async def test_a_verdict_that_contradicts_its_own_odds_abstains() -> None:
    async def compare(first: int, second: int) -> Verdict:
        return Verdict("first", -4.0, "A", 1)

    assert (await in_both_orders(0, 1, compare, MARGIN)) == Duel(None, "margin")


async def test_a_circle_of_preferences_has_no_winner() -> None:
    beats = {(0, 1), (1, 2), (2, 0)}
    critic = FakeCritic(lambda a, b: 5.0 if (a, b) in beats else -5.0)
    choice = await choose(contenders(1, 1, 1), duels(critic))
    assert choice.picked_by == "fallback"
    assert choice.abstention == "intransitive"


async def test_facts_decide_without_asking_the_critic() -> None:
    critic = ranking(9.0, 0.0, 5.0)
    assert await choose(contenders(3, 1, 1, failed=(0, 2)), duels(critic)) == Choice(1, "facts")
    assert critic.asked == []


async def test_a_failed_candidate_is_never_shown_to_the_critic() -> None:
    critic = ranking(9.0, 0.0, 5.0)
    assert await choose(contenders(3, 1, 1, failed=(0,)), duels(critic)) == Choice(2, "critic")
    assert all(0 not in asked for asked in critic.asked)


async def test_where_all_failed_the_trajectory_goes_on_but_nothing_is_decided() -> None:
    critic = ranking(1.0, 0.0)
    assert await choose(contenders(1, 4, failed=(0, 1)), duels(critic)) == Choice(1, "fallback", "all_failed")


async def test_candidates_that_agree_need_no_critic() -> None:
    critic = ranking(1.0)
    assert await choose(contenders(5), duels(critic)) == Choice(0, "agreed")
    assert critic.asked == []


async def test_the_fallback_is_the_most_sampled_and_not_the_first() -> None:
    critic = FakeCritic(lambda a, b: None)
    choice = await choose(contenders(1, 3, 1), duels(critic))
    assert choice.picked == 1


async def test_the_margin_of_a_duel_is_the_smaller_of_both_orders() -> None:
    margins = {(0, 1): 4.0, (1, 0): -2.5}
    critic = FakeCritic(lambda a, b: margins[a, b])
    assert await in_both_orders(0, 1, critic.compare, MARGIN) == Duel(0, margin=2.5)
    assert await in_both_orders(1, 0, critic.compare, MARGIN) == Duel(0, margin=2.5)
