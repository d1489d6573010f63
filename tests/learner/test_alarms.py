"""The alarms of a training run, metric by metric."""

from __future__ import annotations

import math

import pytest
from nightschool_learner.alarms import end_metrics, find_alarms, look_alarms
from nightschool_learner.manifest import AlarmLimits, Look

LIMITS = AlarmLimits(max_chosen_fall=2.0, max_drift=50.0, max_length_ratio=1.5)


def rows(chosen: float, rejected: float, *, num: int = 8, **extra: float) -> list[dict[str, float]]:
    """Rewards that grow linearly to their last value; beta is 0.1."""
    return [
        {
            "step": i + 1,
            "loss": 0.7,
            "rewards/chosen": 0.1 * chosen * (i + 1) / num,
            "rewards/rejected": 0.1 * rejected * (i + 1) / num,
        }
        | extra
        for i in range(num)
    ]


def names(chosen: float, rejected: float, length_ratio: float = 1.0, **extra: float) -> list[str]:
    return [alarm.name for alarm in find_alarms(rows(chosen, rejected, **extra), 0.1, LIMITS, length_ratio)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (3, -20, []),
        (-1, -20, []),
        (-4, -20, ["chosen_fall"]),
        (3, -80, ["drift"]),
        (80, 3, ["drift"]),
        (-90, -95, ["chosen_fall", "drift"]),
    ],
)
def test_falls_and_drift_are_seen_in_nats(chosen: float, rejected: float, expected: list[str]) -> None:
    assert names(chosen, rejected) == expected


def test_only_the_end_of_the_run_counts() -> None:
    fallen_then_back = rows(-40, -10, num=6) + rows(2, -10, num=18)
    assert find_alarms(fallen_then_back, 0.1, LIMITS) == ()


def test_length_is_judged_by_the_pairs() -> None:
    assert names(1, -1, 1.4) == []
    assert names(1, -1, 1.6) == ["length"]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_values_that_are_not_finite_are_an_alarm(broken: float) -> None:
    assert names(1, -1, loss=broken) == ["not_finite"]


def test_a_message_has_number_and_limit() -> None:
    (alarm,) = find_alarms(rows(-4, -20), 0.1, LIMITS)
    assert alarm.value == pytest.approx(3.75)
    assert alarm.message == "chosen answers lost 3.75 nats each (limit 2)"


def test_end_metrics_are_means_over_the_last_quarter() -> None:
    metrics = end_metrics(rows(8, -16), 0.1)
    assert metrics["log_ratio/chosen"] == pytest.approx(7.5)
    assert metrics["log_ratio/rejected"] == pytest.approx(-15)
    partly = [*rows(8, -16, num=7), {"step": 8, "loss": 0.7}]
    assert end_metrics(partly, 0.1)["log_ratio/chosen"] == pytest.approx(8), "a batch of KTO may have no bad answer"
    assert end_metrics([], 0.1) == {}
    assert find_alarms([], 0.1, LIMITS) == ()


def test_a_margin_that_leaves_nothing_to_learn_is_an_alarm() -> None:
    grown = [
        row | {"rewards/margins": margin} for row, margin in zip(rows(1, -1), (1, 2, 4, 6, 7, 8, 9, 12), strict=True)
    ]
    (alarm,) = find_alarms(grown, 0.1, LIMITS)
    assert (alarm.name, alarm.value, alarm.limit) == ("saturation", 10.5, 8.0)
    assert find_alarms(grown[:6], 0.1, LIMITS) == ()


@pytest.mark.parametrize(
    ("kl", "anchor_nll", "length_ratio", "expected"),
    [
        (0.1, 0.3, 1.2, []),
        (0.1, 0.3, 0.8, []),
        (0.6, 0.3, 1.0, ["kl"]),
        (0.1, 0.9, 1.0, ["anchor_fall"]),
        (0.1, 0.3, 1.6, ["length_drift"]),
        (0.1, 0.3, 0.5, ["length_drift"]),
        (0.1, 0.3, 0.0, ["length_drift"]),
    ],
)
def test_a_look_is_judged_against_the_start(
    kl: float, anchor_nll: float, length_ratio: float, expected: list[str]
) -> None:
    start = Look(step=0, loss=1, margin=0, accuracy=0.5, anchor_nll=0.2, kl=0, length_ratio=1)
    look = start.model_copy(update={"step": 4, "kl": kl, "anchor_nll": anchor_nll, "length_ratio": length_ratio})
    assert [alarm.name for alarm in look_alarms(look, start, LIMITS)] == expected


def test_answers_may_become_as_long_as_the_pairs_say() -> None:
    """A night that teaches to call a tool where a number was guessed makes answers five times as long."""
    start = Look(step=0, loss=1, margin=0, accuracy=0.5, anchor_nll=0.2, kl=0, length_ratio=1)
    taught = start.model_copy(update={"step": 4, "length_ratio": 5.1, "length_told": 5.0})
    assert look_alarms(taught, start, LIMITS) == ()
    (alarm,) = look_alarms(taught.model_copy(update={"length_ratio": 8.0}), start, LIMITS)
    assert (alarm.name, alarm.value) == ("length_drift", 1.6)
