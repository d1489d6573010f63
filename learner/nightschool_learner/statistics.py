"""The statistics of a paired comparison: pure functions over counts and per-task outcomes.

Candidate and incumbent answer the same tasks, so everything here is paired: what counts is on how many
tasks they differ, not how many each solves. Owns no thresholds (see `gate.py`) and touches no rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
"""Bootstrap resamples: the 2.5% quantile of 10,000 moves by about 0.001 at n = 400 between seeds."""

_CHUNK = 1_000
"""Resamples drawn at once, so that memory stays at `_CHUNK` x n indices."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval at a confidence level."""

    low: float
    high: float
    level: float


def mcnemar_p(num_gained: int, num_lost: int) -> float:
    """The exact two-sided p-value that gains and losses are equally likely.

    Under the null hypothesis each of the b + c tasks on which the two differ falls to either side with
    probability 1/2, so with m = min(b, c):  p = min(1, 2 * sum_{i<=m} C(b+c, i) / 2^(b+c)).
    Integer arithmetic: exact at any size. 1 where nothing differs.
    Source: McNemar 1947, in the exact binomial form (e.g. Agresti, Categorical Data Analysis, 10.1).
    """
    if num_gained < 0 or num_lost < 0:
        raise ValueError(f"counts must not be negative: gained {num_gained}, lost {num_lost}")
    total = num_gained + num_lost
    tail = sum(math.comb(total, i) for i in range(min(num_gained, num_lost) + 1))
    return min(1.0, float(2 * tail / (1 << total)))


def paired_bootstrap(
    incumbent: Sequence[float],
    candidate: Sequence[float],
    *,
    seed: int,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """The percentile bootstrap interval of mean(candidate - incumbent) over tasks.

    incumbent, candidate: [n], element i of both from the same task. Whole tasks are resampled with
    replacement, which keeps the pairing: d*_b = mean(d[idx_b]), idx_b ~ Uniform{0..n-1}^n, and the interval
    is the (1 -+ level)/2 quantiles of d*. Deterministic by `seed`. Raises ValueError on unequal or no tasks.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13.
    """
    import numpy as np

    if len(incumbent) != len(candidate) or not incumbent:
        raise ValueError(f"paired outcomes need the same tasks: {len(incumbent)} against {len(candidate)}")
    differences: NDArray[np.float64] = np.asarray(candidate, float) - np.asarray(incumbent, float)
    rng = np.random.default_rng(seed)
    n = len(differences)
    means = np.concatenate(
        [
            differences[rng.integers(0, n, size=(min(_CHUNK, num_resamples - start), n))].mean(axis=1)
            for start in range(0, num_resamples, _CHUNK)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """The Wilson score interval of a success rate; stays inside [0, 1] and is sound near its ends.

    centre = (p + z^2/2n) / (1 + z^2/n), half = z/(1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2), p = successes/n.
    Source: Wilson 1927; Brown, Cai and DasGupta 2001.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n > 0")
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, spread = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / spread
    half = z / spread * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return Interval(max(0.0, centre - half), min(1.0, centre + half), level)


def minimum_detectable_difference(n: int, discordant_share: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference in success that n paired tasks find with the given power.

    The d that solves  n = (z_{1-alpha/2} sqrt(psi) + z_power sqrt(psi - d^2))^2 / d^2,  where psi is
    `discordant_share`, the expected share of tasks on which the two differ (d <= psi always). Returns
    psi itself where even the largest possible difference is too small for n.
    Source: Miettinen 1968; Connor 1987 (sample size of McNemar's test).
    """
    if n <= 0 or not 0 < discordant_share <= 1:
        raise ValueError(f"need n > 0 and 0 < discordant_share <= 1: n {n}, share {discordant_share}")
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)

    def needed(d: float) -> float:
        root = z_alpha * math.sqrt(discordant_share) + z_power * math.sqrt(max(0.0, discordant_share - d * d))
        return (root / d) ** 2

    low, high = 1e-9, discordant_share
    if needed(high) > n:
        return discordant_share
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) > n else (low, middle)
    return high
