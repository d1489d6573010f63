"""Tango's test against a search for the likeliest hypothesis, and its error by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from nightschool_learner.non_inferiority import non_inferiority_p
from scipy import optimize, stats


def by_search(n: int, gained: int, lost: int, margin: float) -> float:
    """The same score statistic with the likelihood maximised numerically."""

    def minus_loglik(q: float) -> float:
        up, same = q - margin, 1 - 2 * q + margin
        terms = ((gained, up), (lost, q), (n - gained - lost, same))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    found = optimize.minimize_scalar(minus_loglik, bounds=(margin, (1 + margin) / 2), method="bounded",
                                     options={"xatol": 1e-12})  # fmt: skip
    z = (gained - lost + n * margin) / math.sqrt(n * (2 * found.x - margin * (1 + margin)))
    return float(stats.norm.sf(z))


@pytest.mark.parametrize(
    ("n", "gained", "lost"), [(55, 3, 5), (55, 0, 4), (40, 6, 2), (100, 20, 25), (400, 10, 60), (55, 9, 9)]
)
@pytest.mark.parametrize("margin", [0.05, 0.15, 0.3])
def test_p_equals_that_of_the_maximised_likelihood(n: int, gained: int, lost: int, margin: float) -> None:
    assert non_inferiority_p(n, gained, lost, margin) == pytest.approx(by_search(n, gained, lost, margin), abs=2e-4)


def test_where_nothing_differs_only_the_number_of_tasks_counts() -> None:
    found = [non_inferiority_p(n, 0, 0, 0.15) for n in (8, 20, 55, 400)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.05 > found[1]
    assert non_inferiority_p(55, 0, 0, 0.15) == pytest.approx(stats.norm.sf(math.sqrt(55 * 0.15 / 0.85)))


@pytest.mark.parametrize(("n", "share", "margin"), [(55, 0.2, 0.15), (55, 0.4, 0.15), (120, 0.2, 0.1), (30, 0.3, 0.15)])
def test_a_family_that_is_worse_by_the_margin_is_called_no_worse_about_as_often_as_alpha(
    n: int, share: float, margin: float
) -> None:
    rng = np.random.default_rng(2)
    gains, losses = (share - margin) / 2, (share + margin) / 2
    drawn = rng.multinomial(n, [gains, losses, 1 - share], size=4_000)
    called = sum(non_inferiority_p(n, int(b), int(c), margin) <= 0.05 for b, c, _ in drawn) / 4_000
    assert called <= 0.065


def test_with_one_worse_family_of_eight_all_pass_no_more_often_than_alpha() -> None:
    """Why no correction is needed: the claim is that every family is no worse, and each must be proven."""
    rng = np.random.default_rng(5)
    worse = rng.multinomial(55, [0.025, 0.175, 0.8], size=2_000)
    same = rng.multinomial(55, [0.02, 0.02, 0.96], size=(2_000, 7))
    passed = sum(
        all(non_inferiority_p(55, int(b), int(c), 0.15) <= 0.05 for b, c, _ in [one, *others])
        for one, others in zip(worse, same, strict=True)
    )
    assert passed / 2_000 <= 0.065


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="gained"):
        non_inferiority_p(5, 3, 3, 0.1)
    with pytest.raises(ValueError, match="margin"):
        non_inferiority_p(5, 1, 1, 0.0)
