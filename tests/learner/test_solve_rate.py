"""What a few answers say of a task, and which tasks are worth practising."""

from __future__ import annotations

import pytest
from nightschool_learner.solve_rate import Answer, estimate_of, same_answer
from nightschool_server.config.difficulty import ProbeConfig
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.errors import ConfigError


@pytest.mark.parametrize(
    ("said", "rate", "verdict"),
    [
        (["12", "12", "12", "12"], 1.0, "always_solved"),
        (["12", "12", "12", "13"], 0.75, "kept"),
        (["12", "12", "13", "13"], 0.5, "kept"),
        (["12", "12", "", ""], 0.5, "kept"),
        (["12", "13", "14", "15"], 0.0, "never_solved"),
        (["12", "", "", ""], 0.0, "never_solved"),
        (["", "", "", ""], 0.0, "never_solved"),
    ],
)
def test_answers_vouch_for_each_other_where_nobody_knows_better(said: list[str], rate: float, verdict: str) -> None:
    estimate = estimate_of([Answer(text) for text in said], 0.5)
    assert (estimate.solve_rate, estimate.num_samples, estimate.by) == (rate, 4, "agreement")
    assert estimate.verdict(ProbeConfig()) == verdict


@pytest.mark.parametrize(
    ("answers", "rate", "by", "verdict"),
    [
        ([Answer("wrong", 0.0)] * 4, 0.0, "scorer", "never_solved"),
        ([Answer("12", 1.0)] * 3 + [Answer("")], 0.75, "scorer", "kept"),
        ([Answer("12", 0.6), Answer("14", 0.4), Answer("13", 0.9)], 2 / 3, "scorer", "kept"),
        ([Answer("12", 1.0)] * 3 + [Answer("13", None)], 0.75, "agreement", "kept"),
    ],
)
def test_who_can_say_what_is_right_decides_and_answers_that_agree_may_all_be_wrong(
    answers: list[Answer], rate: float, by: str, verdict: str
) -> None:
    estimate = estimate_of(answers, 0.5)
    assert (estimate.solve_rate, estimate.by) == (rate, by)
    assert estimate.verdict(ProbeConfig()) == verdict


def test_thresholds_are_settings_and_must_leave_something() -> None:
    strict = ProbeConfig(min_solve_rate=0.25, max_solve_rate=0.75)
    rates = [estimate_of([Answer("a")] * n + [Answer("")] * (8 - n), 0.5).verdict(strict) for n in (2, 3, 5, 6)]
    assert rates == ["never_solved", "kept", "kept", "always_solved"]
    with pytest.raises(ConfigError, match="no task would be kept"):
        with_overrides(LearnerConfig(), ["synthesize.probe.min_solve_rate=0.5", "synthesize.probe.max_solve_rate=0.5"])


def test_case_spaces_and_a_trailing_period_do_not_make_another_answer() -> None:
    assert same_answer(" It  is Twelve. ") == same_answer("it is twelve")
    assert same_answer("12") != same_answer("13")
