"""The paired statistics against brute force, scipy and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from nightschool_learner.statistics import mcnemar_p, minimum_detectable_difference, paired_bootstrap, wilson
from scipy import stats


@pytest.mark.parametrize(("gained", "lost"), [(b, c) for b in range(6) for c in range(6)])
def test_mcnemar_equals_the_count_over_every_assignment_of_signs(gained: int, lost: int) -> None:
    total = gained + lost
    distance = abs(gained - lost)
    extreme = sum(abs(2 * sum(signs) - total) >= distance for signs in itertools.product((0, 1), repeat=total))
    assert mcnemar_p(gained, lost) == pytest.approx(extreme / 2**total)


@pytest.mark.parametrize(("gained", "lost"), [(110, 8), (8, 110), (53, 47), (0, 400), (1, 0), (700, 610)])
def test_mcnemar_equals_scipys_two_sided_binomial_test(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue
    assert mcnemar_p(gained, lost) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_of_no_difference_is_one() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(17, 17) == 1.0


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="gained -1"):
        mcnemar_p(-1, 3)


def test_bootstrap_interval_agrees_with_the_slow_loop_and_with_scipy() -> None:
    rng = np.random.default_rng(5)
    incumbent = (rng.random(120) < 0.6).astype(float)
    candidate = np.where(rng.random(120) < 0.3, (rng.random(120) < 0.9).astype(float), incumbent)
    ours = paired_bootstrap(list(incumbent), list(candidate), seed=1)
    differences = candidate - incumbent
    slow = [np.mean(rng.choice(differences, size=120)) for _ in range(4_000)]
    assert ours.low == pytest.approx(np.quantile(slow, 0.025), abs=0.012)
    assert ours.high == pytest.approx(np.quantile(slow, 0.975), abs=0.012)
    theirs = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=9_999, rng=np.random.default_rng(2)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_bootstrap_is_the_same_for_the_same_seed_and_ignores_how_it_is_chunked() -> None:
    before, after = [0.0, 1.0, 0.0, 1.0, 0.0] * 9, [1.0, 1.0, 0.0, 1.0, 1.0] * 9
    first = paired_bootstrap(before, after, seed=7, num_resamples=2_500)
    assert first == paired_bootstrap(before, after, seed=7, num_resamples=2_500)
    assert first != paired_bootstrap(before, after, seed=8, num_resamples=2_500)
    assert first.level == 0.95


def test_bootstrap_of_equal_outcomes_has_no_width() -> None:
    interval = paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], seed=0)
    assert (interval.low, interval.high) == (0.0, 0.0)


def test_bootstrap_refuses_tasks_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match="2 against 1"):
        paired_bootstrap([1.0, 0.0], [1.0], seed=0)
    with pytest.raises(ValueError, match="0 against 0"):
        paired_bootstrap([], [], seed=0)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered, trials, truth = 0, 300, 0.2 * 0.8 - 0.2 * 0.3
    for trial in range(trials):
        change = rng.random(200) < 0.2
        incumbent = (rng.random(200) < 0.3).astype(float)
        candidate = np.where(change, (rng.random(200) < 0.8).astype(float), incumbent)
        interval = paired_bootstrap(list(incumbent), list(candidate), seed=trial, num_resamples=600)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / trials <= 0.985


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 10), (240, 400), (399, 400), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_wilson_equals_scipy(successes: int, n: int, level: float) -> None:
    ours = wilson(successes, n, level)
    theirs = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson(11, 10)


@pytest.mark.parametrize(("n", "share"), [(100, 0.3), (400, 0.3), (400, 0.1), (1000, 0.5)])
def test_minimum_detectable_difference_solves_its_own_equation(n: int, share: float) -> None:
    d = minimum_detectable_difference(n, share)
    z_alpha, z_power = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    assert ((z_alpha * math.sqrt(share) + z_power * math.sqrt(share - d * d)) / d) ** 2 == pytest.approx(n)


def test_minimum_detectable_difference_has_about_the_power_it_claims() -> None:
    n, share = 400, 0.25
    d = minimum_detectable_difference(n, share)
    rng = np.random.default_rng(3)
    outcomes = rng.multinomial(n, [(share + d) / 2, (share - d) / 2, 1 - share], size=2_000)
    found = sum(mcnemar_p(int(b), int(c)) <= 0.05 for b, c, _ in outcomes)
    assert 0.74 <= found / 2_000 <= 0.86


def test_more_tasks_find_smaller_differences_and_too_few_find_none() -> None:
    found = [minimum_detectable_difference(n, 0.3) for n in (50, 100, 400, 1600)]
    assert found == sorted(found, reverse=True)
    assert minimum_detectable_difference(5, 0.2) == 0.2
