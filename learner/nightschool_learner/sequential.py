"""Looking at the results while they come in, without paying for it with errors: e-values and confidence sequences.

Per task x = candidate - incumbent in {-1, 0, 1}. A gambler who starts with 1 and bets the share l on "the mean of x is
above m" owns prod_i (1 + l (x_i - m)) after n tasks. Where the mean is at most m that is a nonnegative supermartingale,
and so is the mean over many gamblers with fixed l; by Ville's inequality it ever reaches 1/alpha with a chance of at
most alpha, whenever and however often somebody looks. Nothing is spent on a look, nothing must be planned.
Sources: Ville 1939; Waudby-Smith and Ramdas 2024, JRSS-B 86:1 (arXiv 2010.09686), sec. 4, with a uniform mixture over
l in place of their plug-in bets; Ramdas et al. 2023 (arXiv 2210.01948) on e-values.

The order of tasks must not depend on their results: looks are at prefixes of an order that is drawn beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nightschool_learner.statistics import Interval

NUM_GAMBLERS = 256
"""Shares l, evenly over what may be bet."""

Verdict = Literal["accepted", "futile", "complete"]


@dataclass(frozen=True)
class Counts:
    """Tasks by what became of them: solved by the candidate alone, by the incumbent alone, alike."""

    gained: int
    lost: int
    same: int

    @property
    def n(self) -> int:
        return self.gained + self.lost + self.same


@dataclass(frozen=True)
class EarlyStop:
    """Where an evaluation ended that was looked at while it ran."""

    verdict: Verdict
    """`accepted`: the candidate passed before the end. `futile`: it is surely not better by `futility_difference`."""
    n: int
    num_planned: int
    num_looks: int
    e_value: float
    """Evidence that the candidate is better, at the end; 1 is none."""
    e_futile: float
    """Evidence that it is not better by `futility_difference`."""
    futility_difference: float


def evidence_above(counts: Counts, bound: float) -> float:
    """The e-value against: the mean difference is at most `bound`, which lies in (-1, 1)."""
    return _capital(counts.gained, counts.lost, counts.same, bound)


def evidence_below(counts: Counts, bound: float) -> float:
    """The e-value against: the mean difference is at least `bound`, which lies in (-1, 1)."""
    return _capital(counts.lost, counts.gained, counts.same, -bound)


def confidence_sequence(counts: Counts, level: float) -> Interval:
    """An interval of the mean difference that holds at every look at once with a chance of `level`.

    The means that neither side has evidence of 2 / (1 - level) against.
    """
    needed = 2 / (1 - level)
    low = _edge(lambda m: evidence_above(counts, m) >= needed, -1.0, 1.0)
    high = -_edge(lambda m: evidence_below(counts, -m) >= needed, -1.0, 1.0)
    return Interval(low, high, level)


def looks(n: int, first: int, every: int) -> list[int]:
    """After how many tasks somebody looks; the last look is at all of them."""
    return [*range(min(first, n), n, every), n]


def _capital(up: int, down: int, same: int, bound: float) -> float:
    import numpy as np

    assert -1 < bound < 1
    # The most that may be bet loses everything at x = -1.
    shares = (np.arange(NUM_GAMBLERS) + 0.5) / NUM_GAMBLERS / (1 + bound)
    logs = (
        up * np.log1p(shares * (1 - bound)) + down * np.log1p(-shares * (1 + bound)) + same * np.log1p(-shares * bound)
    )
    return float(np.exp(np.minimum(np.logaddexp.reduce(logs) - np.log(NUM_GAMBLERS), 700.0)))


def _edge(is_refuted: Callable[[float], bool], low: float, high: float) -> float:
    """The largest refuted mean, or `low` where none is; what is refuted lies below what is not."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low
