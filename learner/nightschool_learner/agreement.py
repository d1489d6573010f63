"""How well a critic agrees with the gold set, and what else can be told of it: pure functions over what it said.

Owns the numbers and the floors that they are held against. Sources: the interval is Wilson's (1927), kappa Cohen's
(1960); the bar is the 82% agreement with people that SPORT reports for its critic (arXiv 2504.21561).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nightschool_server.config.roles import CriticConfig

from nightschool_learner.gold import Better
from nightschool_learner.statistics import Interval, wilson

PAPER_AGREEMENT = 0.82
"""SPORT's critic with people."""


@dataclass(frozen=True)
class Judged:
    """One gold pair and what the critic made of it."""

    id: str
    better: Better
    said: Better | None
    """None where it abstained; a critic never says tie."""
    why: str
    """Of an abstention."""
    component: str
    margin_of_a: float | None
    """The judge's mean margin in favour of `a` over both orders; None where it could not be read."""
    chars_a_over_b: int
    """By how many characters the action of `a` is longer."""
    first_won: tuple[bool, ...]
    """For each readable answer, whether the candidate shown first won."""
    num_unreadable: int


@dataclass(frozen=True)
class Agreement:
    """The audit's numbers. Rates are None where nothing was counted."""

    num_pairs: int
    num_decided: int
    """Pairs with a better side on which the critic was sure."""
    num_agreed: int
    agreement: Interval | None
    """Of those decided, Wilson at 95%."""
    kappa: float | None
    """Cohen's, over the same."""
    abstention_rate: float | None
    """Of pairs with a better side."""
    abstentions: Mapping[str, int]
    num_ties: int
    num_ties_decided: int
    """Ties on which it was sure of a side: it should not have been."""
    first_win_rate: Interval | None
    """Share of readable answers for the candidate shown first; one half is fair."""
    second_win_rate: Interval | None
    length_correlation: float | None
    """Pearson's, of the margin of `a` and how much longer it is."""
    gold_length_correlation: float | None
    """The same of the gold labels: what a perfect critic would show."""
    parse_failure_rate: float | None
    """Of all answers of the judge."""
    decided_by: Mapping[str, int]

    @property
    def rate(self) -> float | None:
        """Share of those decided on which it agreed."""
        return self.num_agreed / self.num_decided if self.num_decided else None

    @property
    def against_paper(self) -> str:
        """Where the interval lies beside the paper's 82%."""
        if self.agreement is None:
            return "nothing was decided"
        if self.agreement.low > PAPER_AGREEMENT:
            return "above"
        return "below" if self.agreement.high < PAPER_AGREEMENT else "not told apart"


def measure(judged: Sequence[Judged]) -> Agreement:
    """The numbers of an audit."""
    sided = [one for one in judged if one.better != "tie"]
    decided = [one for one in sided if one.said is not None]
    ties = [one for one in judged if one.better == "tie"]
    num_agreed = sum(one.said == one.better for one in decided)
    won = [first for one in judged for first in one.first_won]
    num_unreadable = sum(one.num_unreadable for one in judged)
    num_answers = len(won) + num_unreadable
    measured = [(one.margin_of_a, one.chars_a_over_b) for one in judged if one.margin_of_a is not None]
    return Agreement(
        num_pairs=len(judged),
        num_decided=len(decided),
        num_agreed=num_agreed,
        agreement=wilson(num_agreed, len(decided)) if decided else None,
        kappa=kappa([(one.better, one.said or "") for one in decided]),
        abstention_rate=1 - len(decided) / len(sided) if sided else None,
        abstentions=dict(Counter(one.why for one in sided if one.said is None)),
        num_ties=len(ties),
        num_ties_decided=sum(one.said is not None for one in ties),
        first_win_rate=wilson(sum(won), len(won)) if won else None,
        second_win_rate=wilson(len(won) - sum(won), len(won)) if won else None,
        length_correlation=pearson([m for m, _ in measured], [float(chars) for _, chars in measured]),
        gold_length_correlation=pearson(
            [1.0 if one.better == "a" else -1.0 for one in sided], [float(one.chars_a_over_b) for one in sided]
        ),
        parse_failure_rate=num_unreadable / num_answers if num_answers else None,
        decided_by=dict(Counter(one.component for one in judged if one.said is not None)),
    )


def kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of two raters: (p_o - p_e) / (1 - p_e). None without pairs, or where chance alone agrees always."""
    if not pairs:
        return None
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(left[label] * right[label] for label in left) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The correlation coefficient; None for fewer than three points or where one of them does not vary."""
    n = len(x)
    if n < 3:
        return None
    mean_x, mean_y = sum(x) / n, sum(y) / n
    dx, dy = [value - mean_x for value in x], [value - mean_y for value in y]
    spread = sum(d * d for d in dx) * sum(d * d for d in dy)
    if spread == 0:
        return None
    return float(sum(a * b for a, b in zip(dx, dy, strict=True)) / spread**0.5)


def faults_of(agreement: Agreement, config: CriticConfig) -> list[str]:
    """Which floors the critic fails, one sentence each; none where there is too little gold to tell."""
    if agreement.num_pairs < config.min_gold:
        return []
    found: list[str] = []
    rate = agreement.rate
    if config.min_agreement and (rate is None or rate < config.min_agreement):
        said = (
            "decided none" if rate is None else f"agrees on {rate:.1%} of the {agreement.num_decided} that it decided"
        )
        found.append(
            f"of {agreement.num_pairs} gold pairs the critic {said}; critic.min_agreement is {config.min_agreement:.0%}"
        )
    found += position_faults(agreement.first_win_rate, agreement.parse_failure_rate, config)
    return found


def position_faults(first: Interval | None, unreadable: float | None, config: CriticConfig) -> list[str]:
    """Which of the floors that need no gold the critic fails: preferring a position, and answers nobody can read.

    A preference counts where even the end of its interval that is nearer to one half is beyond the bound.
    """
    found: list[str] = []
    low, high = 0.5 - config.max_position_bias, 0.5 + config.max_position_bias
    if first is not None and (first.low > high or first.high < low):
        found.append(
            f"the candidate shown first won {first.low:.0%} to {first.high:.0%} of the answers; "
            f"critic.max_position_bias allows {low:.0%} to {high:.0%}"
        )
    if unreadable is not None and unreadable > config.max_parse_failures:
        found.append(
            f"{unreadable:.1%} of the critic's answers could not be read; "
            f"critic.max_parse_failures is {config.max_parse_failures:.0%}"
        )
    return found
