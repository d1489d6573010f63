"""The gate's rules, one by one and together, on tables of paired results."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from nightschool_learner.ability import Ability
from nightschool_learner.comparison import compare, paired
from nightschool_learner.diversity import sampled_numbers
from nightschool_learner.evaluation_results import TaskResult
from nightschool_learner.evidence import terms_of
from nightschool_learner.gate import Decision, Evidence, decide
from nightschool_server.config.training import GateConfig

LIMITS = GateConfig(min_n=100)


def results(
    outcomes: str, *, family: Callable[[int], str] = lambda i: f"family{i % 4}", **fields: object
) -> list[TaskResult]:
    """One result for each character: `1` solved, `0` not."""
    base = TaskResult("", "", False, "", "answered", 2, 0, 40)
    return [
        replace(base, task_id=f"t{i:04}", family=family(i), success=c == "1", **fields)  # type: ignore[arg-type]
        for i, c in enumerate(outcomes)
    ]


def judge(before: list[TaskResult], after: list[TaskResult], limits: GateConfig = LIMITS) -> Decision:
    pairs = paired(before, after)
    return decide(Evidence(compare(pairs, terms_of(limits, 1))), limits)


def failed(decision: Decision) -> set[str]:
    return {rule.name for rule in decision.rules if rule.decides and not rule.held}


def test_a_clear_gain_passes_and_every_rule_says_its_number() -> None:
    decision = judge(results("0" * 60 + "1" * 140), results("1" * 50 + "0" * 10 + "1" * 140))
    assert decision.passed
    assert failed(decision) == set()
    assert len(decision.reasons) == 13
    assert all(reason.startswith("held: ") and any(c.isdigit() for c in reason) for reason in decision.reasons)
    assert decision.numbers.num_gained == 50
    assert decision.numbers.num_lost == 0
    assert decision.numbers.difference == pytest.approx(0.25)


def test_equal_results_fail_difference_significance_and_interval() -> None:
    same = results("01" * 100)
    decision = judge(same, same)
    assert not decision.passed
    assert failed(decision) == {"difference", "significance", "interval"}
    assert decision.reasons[0].startswith("FAILED: ")


@pytest.mark.parametrize(
    ("gained", "lost", "broken"),
    [
        (40, 2, set()),
        (20, 0, set()),
        (7, 0, {"significance"}),
        (4, 0, {"difference", "significance"}),
        (40, 36, {"difference", "significance", "interval"}),
        (0, 40, {"difference", "significance", "interval", "families"}),
    ],
)
def test_gains_and_losses_decide(gained: int, lost: int, broken: set[str]) -> None:
    rest = 200 - gained - lost
    before = results("0" * gained + "1" * lost + "1" * rest)
    after = results("1" * gained + "0" * lost + "1" * rest)
    assert failed(judge(before, after)) == broken


def test_too_few_tasks_never_pass() -> None:
    assert failed(judge(results("0" * 60 + "1" * 39), results("1" * 99))) == {"tasks"}


def test_only_tasks_that_both_answered_count() -> None:
    decision = judge(results("0" * 150), results("1" * 120))
    assert decision.numbers.n == 120


def test_results_without_a_common_task_are_refused() -> None:
    with pytest.raises(ValueError, match="both"):
        paired(results("01"), [replace(results("1")[0], task_id="other")])


def test_a_family_that_falls_is_named_even_where_the_whole_rises() -> None:
    def family(i: int) -> str:
        return "till" if i < 40 else "rest"

    before = results("1" * 40 + "0" * 160, family=family)
    after = results("1" * 30 + "0" * 10 + "1" * 160, family=family)
    decision = judge(before, after)
    assert failed(decision) == {"families"}
    assert "till 100.0% -> 75.0% (n 40" in decision.reasons[0]


def test_a_small_fall_of_a_family_is_allowed_unless_it_is_significant() -> None:
    def family(i: int) -> str:
        return "till" if i < 100 else "rest"

    before = results("1" * 100 + "0" * 100, family=family)
    slightly = results("0" * 4 + "1" * 96 + "1" * 100, family=family)
    surely = results("0" * 9 + "1" * 91 + "1" * 100, family=family)
    assert judge(before, slightly).passed
    assert failed(judge(before, surely)) == {"families"}


@pytest.mark.parametrize(
    ("fields", "broken"),
    [
        ({"num_tool_errors": 0}, set()),
        ({"num_tool_errors": 1}, {"tool errors"}),
        ({"num_unreadable": 1}, {"format"}),
        ({"refused": True}, {"refusals"}),
        ({"num_unsafe": 1}, {"unsafe actions"}),
        ({"num_external": 1}, {"external calls"}),
        ({"outcome": "max_steps"}, {"unanswered"}),
        ({"completion_tokens": 80}, set()),
        ({"completion_tokens": 81}, {"length"}),
        ({"completion_tokens": 200, "num_steps": 6}, set()),
    ],
)
def test_vetoes_catch_what_success_hides(fields: dict[str, object], broken: set[str]) -> None:
    before = results("0" * 60 + "1" * 140)
    assert failed(judge(before, results("1" * 200, **fields))) == broken


def test_every_family_must_be_proven_no_worse_where_that_is_required() -> None:
    def family(i: int) -> str:
        return "till" if i < 60 else "rest" if i < 195 else "few"

    before = results("1" * 60 + "0" * 140, family=family)
    noisy = results("0" * 7 + "1" * 53 + "1" * 140, family=family)
    required = LIMITS.model_copy(update={"non_inferiority": "require", "max_family_p": 0.0})
    reported = judge(before, noisy, LIMITS.model_copy(update={"max_family_p": 0.0}))
    assert reported.passed
    assert any(reason.startswith("noted: non-inferiority: 1 of 2 families") for reason in reported.reasons)
    decision = judge(before, noisy, required)
    assert failed(decision) == {"non-inferiority"}
    assert "not proven: till (p 0.2" in decision.reasons[0]
    assert decision.reasons[0].endswith("1 too small to prove it")
    assert judge(before, results("0" * 2 + "1" * 58 + "1" * 140, family=family), required).passed


def test_lost_diversity_is_reported_and_a_veto_where_configured() -> None:
    before, after = results("0" * 60 + "1" * 140), results("1" * 200)
    tried = [replace(r, draw=draw, success=draw == 1) for r in results("1" * 40) for draw in (1, 2)]
    given_up = [replace(r, success=r.success and r.task_id < "t0020") for r in tried]
    narrowed = sampled_numbers(tried, given_up, temperature=1.0, level=0.95, seed=1)
    numbers = judge(before, after).numbers
    reported = decide(Evidence(numbers, narrowed), LIMITS)
    assert reported.passed
    assert "pass@2: narrowed: pass@1 50.0% -> 25.0%, pass@2 100.0% -> 50.0%" in reported.reasons[-1]
    vetoed = decide(Evidence(numbers, narrowed), LIMITS.model_copy(update={"max_pass_at_n_fall": 0.49}))
    assert failed(vetoed) == {"pass@2"}
    assert decide(Evidence(numbers, narrowed), LIMITS.model_copy(update={"max_pass_at_n_fall": 0.5})).passed


@pytest.mark.parametrize(
    ("base", "candidate", "broken"),
    [(2.5, 2.6, set()), (2.5, 2.71, {"general ability"}), (2.5, 2.4, set()), (7.9, 9.0, set())],
)
def test_general_ability_must_not_be_paid_for_success(base: float, candidate: float, broken: set[str]) -> None:
    numbers = judge(results("0" * 60 + "1" * 140), results("1" * 200)).numbers
    ability = Ability("v", 300, base, base + 0.1, candidate)
    decision = decide(Evidence(numbers, ability=ability), LIMITS)
    assert failed(decision) == broken
    assert any(f"general ability: neutral text {base:.2f} nats a token" in reason for reason in decision.reasons)


def test_a_veto_is_about_a_rise_not_about_a_level() -> None:
    before = results("0" * 60 + "1" * 140, num_tool_errors=1)
    assert judge(before, results("1" * 200, num_tool_errors=1)).passed


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_almost_never_passes(seed: int) -> None:
    rng = random.Random(seed)
    before = "".join(rng.choice("01") for _ in range(400))
    after = "".join(c if rng.random() < 0.8 else rng.choice("01") for c in before)
    assert not judge(results(before), results(after)).passed


def test_a_sabotaged_candidate_fails() -> None:
    decision = judge(results("1" * 240 + "0" * 160), results("1" * 100 + "0" * 300))
    assert not decision.passed
    assert {"difference", "significance", "interval"} <= failed(decision)


def test_the_order_of_results_does_not_matter() -> None:
    before, after = results("0" * 50 + "1" * 150), results("1" * 40 + "0" * 10 + "1" * 150)
    assert judge(before, after).numbers.p_value == judge(before[::-1], after[::-1]).numbers.p_value
    assert judge(before, after).passed == judge(before[::-1], after).passed
