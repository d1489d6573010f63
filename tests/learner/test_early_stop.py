"""Ending an evaluation where its outcome is sure: at which look, with which verdict, and the same on every reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner.evaluation_results import GREEDY, Basis, TaskResult
from nightschool_learner.evidence import Measured, evidence_of, look_at
from nightschool_learner.gate import decide
from nightschool_learner.held_out import Plan, plan_of
from nightschool_learner.stages import Cycle
from nightschool_server.app import EvaluationSet, EvaluationTask
from nightschool_server.store.store import Store

from tests.learner.practice_home import cycle_on, open_home

BASIS = Basis("set", "protocol")
HELD_OUT = EvaluationSet(tuple(EvaluationTask(f"t{i:03}", f"f{i % 4}", f"{i}?", "1") for i in range(400)), "set")
EARLY = ("gate.early_stop=true", "gate.first_look=40", "gate.look_every=40", "gate.min_n=100", "evaluate.num_seeds=0")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_home(tmp_path / "home")
    yield opened
    opened.close()


def measured(plan: Plan, incumbent: Callable[[int], bool], candidate: Callable[[int], bool], n: int = 400) -> Measured:
    """Results of the first n tasks, by their place in the plan's order."""

    def results(solved: Callable[[int], bool]) -> dict[tuple[str, int], TaskResult]:
        return {
            (task.id, GREEDY): TaskResult(task.id, task.family, solved(place), "1", "answered", 1, 0, 9)
            for place, task in enumerate(plan.tasks[:n])
        }

    return Measured(results(incumbent), results(candidate))


def planned(store: Store, *overrides: str) -> tuple[Cycle, Plan]:
    cycle = cycle_on(store, *EARLY, *overrides)
    return cycle, plan_of(cycle, HELD_OUT)


def better(place: int) -> bool:
    return place % 4 != 0


def never(place: int) -> bool:
    return False


def every_second(place: int) -> bool:
    return place % 2 == 0


def test_a_clear_gain_is_accepted_at_the_first_look_with_enough_tasks(store: Store) -> None:
    cycle, plan = planned(store)
    some = measured(plan, every_second, lambda place: True, n=120)
    assert [look_at(cycle, BASIS, plan, some, number) for number in (1, 2)] == [None, None]
    stop = look_at(cycle, BASIS, plan, some, 3)
    assert stop is not None
    assert (stop.verdict, stop.n, stop.num_planned, stop.num_looks) == ("accepted", 120, 400, 3)
    evidence = evidence_of(cycle, BASIS, plan, some)
    assert evidence is not None
    decision = decide(evidence, cycle.config.gate)
    assert decision.passed
    assert decision.numbers.n == 120
    assert "accepted after 120 of 400 tasks, look 3" in str(decision.rules[2])
    assert decision.numbers.interval.low < 0.5 < decision.numbers.interval.high


def test_a_candidate_that_changes_nothing_is_given_up_early_and_fails(store: Store) -> None:
    cycle, plan = planned(store, "gate.futility_difference=0.1")
    same = measured(plan, every_second, every_second, n=80)
    evidence = evidence_of(cycle, BASIS, plan, same)
    assert evidence is not None
    assert evidence.early_stop is not None
    assert (evidence.early_stop.verdict, evidence.early_stop.n) == ("futile", 80)
    assert not decide(evidence, cycle.config.gate).passed


def test_a_veto_keeps_a_gain_from_being_accepted_early_and_at_all(store: Store) -> None:
    cycle, plan = planned(store)
    whole = measured(plan, every_second, lambda place: True)
    swollen = Measured(whole.incumbent, {k: replace(r, completion_tokens=90) for k, r in whole.candidate.items()})
    assert all(look_at(cycle, BASIS, plan, swollen, number) is None for number in range(1, len(plan.looks)))
    evidence = evidence_of(cycle, BASIS, plan, swollen)
    assert evidence is not None
    assert evidence.early_stop is not None
    assert evidence.early_stop.verdict == "complete"
    decision = decide(evidence, cycle.config.gate)
    assert {rule.name for rule in decision.rules if rule.decides and not rule.held} == {"length"}


def test_the_end_is_looked_at_like_every_look(store: Store) -> None:
    """No change of tests at the end: a gain that McNemar would accept there is not accepted on too little evidence."""
    cycle, plan = planned(store, "gate.max_p=0.05", "gate.futility_difference=0.5")
    slightly = measured(plan, lambda place: place % 100 == 1, lambda place: place % 40 == 0)
    evidence = evidence_of(cycle, BASIS, plan, slightly)
    assert evidence is not None
    assert evidence.early_stop is not None
    assert evidence.early_stop.e_value < 40
    assert "significance" in {rule.name for rule in decide(evidence, cycle.config.gate).rules if not rule.held}


def test_results_that_are_missing_are_no_evidence(store: Store) -> None:
    cycle, plan = planned(store)
    assert evidence_of(cycle, BASIS, plan, measured(plan, never, never, n=0)) is None
    assert evidence_of(cycle, BASIS, plan, measured(plan, every_second, lambda place: True, n=100)) is None


def test_the_order_is_drawn_once_a_cycle_and_a_prefix_holds_every_family(store: Store) -> None:
    cycle, plan = planned(store)
    assert plan == plan_of(cycle, HELD_OUT)
    assert plan.tasks != HELD_OUT.tasks
    assert sorted(task.id for task in plan.tasks) == [task.id for task in HELD_OUT.tasks]
    counts = [sum(task.family == f"f{i}" for task in plan.tasks[:100]) for i in range(4)]
    assert min(counts) >= 15


def test_without_early_stop_nobody_looks_and_the_order_is_the_set_s(store: Store) -> None:
    cycle, plan = planned(store, "gate.early_stop=false")
    assert plan.tasks == HELD_OUT.tasks
    assert plan.looks == (400,)
    whole = measured(plan, every_second, better)
    evidence = evidence_of(cycle, BASIS, plan, whole)
    assert evidence is not None
    assert evidence.early_stop is None
    assert "McNemar p" in str(decide(evidence, cycle.config.gate).rules[2])
