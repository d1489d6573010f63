"""E-values and confidence sequences: against their definition, and their errors at every look by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from nightschool_learner.sequential import (
    NUM_GAMBLERS,
    Counts,
    confidence_sequence,
    evidence_above,
    evidence_below,
    looks,
)
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]


def by_definition(xs: list[int], bound: float) -> float:
    """What all gamblers own together, bet by bet."""
    owned = [1.0] * NUM_GAMBLERS
    for x in xs:
        owned = [money * (1 + (k + 0.5) / NUM_GAMBLERS / (1 + bound) * (x - bound)) for k, money in enumerate(owned)]
    return sum(owned) / NUM_GAMBLERS


@pytest.mark.parametrize("bound", [-0.3, 0.0, 0.07, 0.5])
def test_evidence_is_what_the_gamblers_own(bound: float) -> None:
    xs = [1, 0, 1, -1, 0, 0, 1, 1, -1, 0, 1]
    counts = Counts(xs.count(1), xs.count(-1), xs.count(0))
    assert evidence_above(counts, bound) == pytest.approx(by_definition(xs, bound))
    assert evidence_below(counts, bound) == pytest.approx(by_definition([-x for x in xs], -bound))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (12, 1), (30, 20), (5, 9)])
def test_against_no_difference_evidence_is_the_mixture_of_binomial_likelihood_ratios(gained: int, lost: int) -> None:
    """integral over theta in [1/2, 1] of (2 theta)^b (2 (1 - theta))^c, times 2: only tasks that differ count."""
    log_beta = special.betaln(gained + 1, lost + 1) + (gained + lost) * math.log(2)
    exact = 2 * math.exp(log_beta) * special.betainc(lost + 1, gained + 1, 0.5)
    for same in (0, 300):
        assert evidence_above(Counts(gained, lost, same), 0.0) == pytest.approx(exact, rel=2e-3)


def test_more_gains_are_more_evidence_and_none_is_one() -> None:
    found = [evidence_above(Counts(gained, 3, 50), 0.0) for gained in range(20)]
    assert found == sorted(found)
    assert evidence_above(Counts(0, 0, 0), 0.0) == 1.0
    assert evidence_above(Counts(440, 0, 0), 0.0) > 1e60


def test_evidence_rises_as_the_bound_falls_so_that_an_interval_can_be_searched() -> None:
    bounds = np.linspace(-0.95, 0.95, 77)
    for counts in (Counts(30, 12, 58), Counts(0, 0, 60), Counts(5, 40, 15)):
        found = [evidence_above(counts, float(bound)) for bound in bounds]
        assert all(a >= b or a < 1 for a, b in itertools.pairwise(found))


def paths(difference: float, share: float, n: int, size: int, seed: int = 3) -> tuple[Floats, Floats, list[int]]:
    """Gains and losses at every look of `size` evaluations whose true difference is `difference`."""
    rng = np.random.default_rng(seed)
    chances = [(share + difference) / 2, (share - difference) / 2, 1 - share]
    x = rng.choice([1, -1, 0], size=(size, n), p=chances)
    at = looks(n, 20, 20)
    places = np.array(at) - 1
    return (x == 1).cumsum(1)[:, places], (x == -1).cumsum(1)[:, places], at


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_a_candidate_that_is_no_better_is_ever_accepted_no_more_often_than_alpha(share: float) -> None:
    gained, lost, at = paths(0.0, share, 440, 3_000)
    capital = {
        (g, b): evidence_above(Counts(g, b, 0), 0.0)
        for g, b in {(int(g), int(b)) for g, b in zip(gained.flat, lost.flat, strict=True)}
    }
    for alpha in (0.05, 0.005):
        ever = sum(
            any(capital[int(g), int(b)] >= 1 / alpha for g, b in zip(gains, losses, strict=True))
            for gains, losses in zip(gained, lost, strict=True)
        )
        # Ville's bound holds exactly; 3 standard errors for the simulation.
        assert ever / 3_000 <= alpha + 3 * (alpha / 3_000) ** 0.5, len(at)


def test_peeking_at_mcnemars_p_instead_would_accept_far_too_often() -> None:
    """Why the fixed test must not be looked at on the way."""
    gained, lost, _ = paths(0.0, 0.3, 440, 2_000)
    z = np.abs(gained - lost) / np.sqrt(np.maximum(1, gained + lost))
    assert (z > 1.96).any(axis=1).mean() > 0.2


def counts_at(gained: Floats, lost: Floats, at: list[int]) -> list[Counts]:
    """One evaluation's counts at every look."""
    return [Counts(int(g), int(b), n - int(g) - int(b)) for g, b, n in zip(gained, lost, at, strict=True)]


def test_a_candidate_as_good_as_promised_is_ever_given_up_no_more_often_than_the_bound() -> None:
    bound = 0.07
    gained, lost, at = paths(bound, 0.25, 440, 400)
    given_up = sum(
        any(evidence_below(counts, bound) >= 20 for counts in counts_at(gs, bs, at))
        for gs, bs in zip(gained, lost, strict=True)
    )
    assert given_up / 400 <= 0.05 + 3 * (0.05 / 400) ** 0.5


def test_the_confidence_sequence_holds_at_all_looks_at_once() -> None:
    """The truth is outside of the interval where either side refutes it; see the next test."""
    truth, misses = 0.1, 0
    gained, lost, at = paths(truth, 0.4, 400, 400)
    for gs, bs in zip(gained, lost, strict=True):
        found = counts_at(gs, bs, at)
        misses += any(max(evidence_above(c, truth), evidence_below(c, truth)) >= 40 for c in found)
    assert misses / 400 <= 0.05 + 3 * (0.05 / 400) ** 0.5


def test_the_confidence_sequence_is_the_set_of_what_is_not_refuted() -> None:
    counts = Counts(50, 20, 130)
    interval = confidence_sequence(counts, 0.95)
    assert evidence_above(counts, interval.low) == pytest.approx(40, rel=1e-3)
    assert evidence_below(counts, interval.high) == pytest.approx(40, rel=1e-3)
    assert interval.low < 0.15 < interval.high
    everything = confidence_sequence(Counts(0, 0, 0), 0.95)
    assert (everything.low, everything.high) == pytest.approx((-1, 1))


def test_looks_begin_where_told_and_end_at_all_tasks() -> None:
    assert looks(440, 60, 100) == [60, 160, 260, 360, 440]
    assert looks(40, 60, 20) == [40]
    assert looks(60, 60, 20) == [60]
