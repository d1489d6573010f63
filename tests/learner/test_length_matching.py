"""Lengths of chosen and rejected answers are matched by leaving out few pairs."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from nightschool_learner.length_matching import Lengths, stretched
from nightschool_learner.pairs import Selection, select
from nightschool_server.config.practice import PairsConfig
from pydantic import ValidationError

from tests.learner.test_pairs import NO_CAPS, candidate, step, won


def ratio(lengths: list[Lengths]) -> float:
    return sum(chosen for chosen, _ in lengths) / sum(rejected for _, rejected in lengths)


def test_lengths_are_matched_by_leaving_out_few() -> None:
    draw = random.Random(3)
    for _ in range(200):
        lengths = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 7))]
        left_out = stretched(lengths, 1.5)
        kept = [pair for index, pair in enumerate(lengths) if index not in left_out]
        assert not kept or 1 / 1.5 - 1e-9 <= ratio(kept) <= 1.5 + 1e-9
        most = max(
            (size for size in range(1, len(lengths) + 1) for some in itertools.combinations(lengths, size)
             if 1 / 1.5 - 1e-9 <= ratio(list(some)) <= 1.5 + 1e-9),
            default=0,
        )  # fmt: skip
        assert most - 1 <= len(kept) <= most


def test_what_is_matched_is_left_alone_and_zero_matches_nothing() -> None:
    assert stretched([(3, 2), (2, 3)], 1.5) == frozenset()
    assert stretched([(90, 1)], 0) == frozenset()
    assert stretched([], 1.5) == frozenset()


def practised(prefer_long: bool, config: PairsConfig) -> Selection:
    """A night of 60 steps with two answers of random lengths; the critic prefers the longer one, or tosses a coin."""
    draw = random.Random(5)
    steps = []
    for number in range(60):
        lengths = draw.randint(4, 40), draw.randint(4, 40)
        winner = int(lengths[1] > lengths[0]) if prefer_long else draw.randint(0, 1)
        name = f"s{number}"
        sides = [replace(candidate(p, step=name), token_ids=(1,) * lengths[p], final=True) for p in (0, 1)]
        steps.append(step(*sides, picked=winner, duels=won(winner, 1 - winner), name=name, task=name))
    return select(steps, config, seed=1)


def test_a_critic_that_prefers_the_longer_answer_teaches_length_only_where_lengths_are_not_matched() -> None:
    unguarded = practised(True, NO_CAPS.model_copy(update={"max_length_ratio": 0.0}))
    guarded = practised(True, NO_CAPS)
    assert ratio([pair.num_tokens for pair in unguarded.pairs]) > 1.8
    assert ratio([pair.num_tokens for pair in guarded.pairs]) <= 1.5
    assert guarded.dropped["length"] == len(unguarded.pairs) - len(guarded.pairs) > 0
    assert "length" not in practised(False, NO_CAPS).dropped


def test_a_few_pairs_are_not_matched() -> None:
    long, short = replace(candidate(0), token_ids=(1,) * 40), replace(candidate(1), token_ids=(1,))
    assert select([step(long, short, duels=won(0, 1))], NO_CAPS, seed=1).dropped == {}


def test_an_answer_against_a_call_is_no_matter_of_length() -> None:
    decided = []
    for number in range(20):
        name = f"s{number}"
        call = replace(candidate(0, step=name), token_ids=(1,) * 40, final=False)
        answer = replace(candidate(1, step=name), token_ids=(1,), final=True)
        failed = replace(candidate(2, step=name, failure="budget"), token_ids=(1,) * 512)
        decided.append(step(call, answer, failed, duels=won(0, 1), name=name, task=name))
    assert len(select(decided, NO_CAPS, seed=1).pairs) == 40


def test_a_ratio_below_one_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_length_ratio is 0\.5; it must be 0 or at least 1"):
        PairsConfig(max_length_ratio=0.5)
