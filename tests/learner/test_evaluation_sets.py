"""Versions of a held-out set: counted, never mixed, and what changed is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner import records
from nightschool_learner.evaluation_records import EvaluationRow, insert_evaluation
from nightschool_learner.evaluation_results import Basis, TaskResult, insert_results, results_of
from nightschool_learner.evaluation_sets import comparability, discordant_share, register
from nightschool_server.app import EvaluationSet, EvaluationTask
from nightschool_server.evaluation_set import digest_of
from nightschool_server.home import Home
from nightschool_server.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(Home(tmp_path / "home").create())
    yield opened
    opened.close()


TASKS = tuple(EvaluationTask(f"{family}-{i}", family, f"{family} {i}?", str(i)) for family in "ab" for i in range(3))


def held_out(tasks: Sequence[EvaluationTask]) -> EvaluationSet:
    return EvaluationSet(tuple(tasks), digest_of(tuple(tasks)))


def decided(store: Store, basis: Basis, **more: object) -> str:
    """A cycle with its decision on a basis."""
    assert records.enqueue(store, "manual", "test") is not None
    cycle = records.open_cycle(store)
    assert cycle is not None
    row = EvaluationRow(
        id=f"eval_{cycle.id}", cycle_id=cycle.id, candidate="0001-aaaaaaaa", incumbent="base",
        set_digest=basis.set_digest, n=40, incumbent_success=0.5, candidate_success=0.6, interval_low=0.0,
        interval_high=0.2, interval_level=0.95, num_gained=7, num_lost=3, p_value=0.3, passed=False, reasons=(),
        families=(), set_version=1, protocol=basis.protocol, detectable=0.1, rules=(), sampled=None, notes=(),
        ability=None, judge=None, early_stop=None, thresholds={},
    )  # fmt: skip
    insert_evaluation(store, replace(row, **more))  # type: ignore[arg-type]
    records.finish(store, cycle.id, "rejected", "test")
    return cycle.id


def test_a_changed_set_is_the_next_version_and_an_old_one_keeps_its_own(store: Store) -> None:
    first = register(store, "shop", held_out(TASKS))
    changed = register(store, "shop", held_out([replace(TASKS[0], answer="9"), *TASKS[1:]]))
    assert (first.version, changed.version) == (1, 2)
    assert register(store, "shop", held_out(TASKS[::-1])) == first
    assert register(store, "another", held_out(TASKS[:4])).version == 1
    assert first.families["a"]["n"] == 3
    assert first.families["a"]["digest"] != changed.families["a"]["digest"]
    assert first.families["b"] == changed.families["b"]


def test_what_changed_since_the_last_evaluation_is_said_with_the_families(store: Store) -> None:
    before = register(store, "shop", held_out(TASKS))
    assert comparability(store, before, Basis(before.digest, "p"), "cycle_now") == ()
    last = decided(store, Basis(before.digest, "p"))
    assert comparability(store, before, Basis(before.digest, "p"), "cycle_now") == ()

    after = register(store, "shop", held_out([replace(TASKS[0], answer="9"), *TASKS[1:]]))
    (said,) = comparability(store, after, Basis(after.digest, "p"), "cycle_now")
    assert f"the evaluation set changed since {last} (version 1 to 2; families a)" in said
    (said,) = comparability(store, before, Basis(before.digest, "q"), "cycle_now")
    assert "the base model, the application or the limits of evaluation changed" in said


def test_results_of_one_basis_are_not_seen_from_another(store: Store) -> None:
    assert records.enqueue(store, "manual", "test") is not None
    cycle = records.open_cycle(store)
    assert cycle is not None
    result = TaskResult("a-0", "a", True, "0", "answered", 2, 1, 30, 4, 3, 1, 2, 3, True, ("x", "y"))
    insert_results(store, Basis("s", "p"), cycle.id, [("base", result)])
    assert results_of(store, Basis("s", "p"), "base") == {("a-0", 3): result}
    assert results_of(store, Basis("t", "p"), "base") == {}
    assert results_of(store, Basis("s", "q"), "base") == {}
    assert results_of(store, Basis("s", "p"), "0001-aaaaaaaa") == {}


def test_the_share_of_differing_tasks_is_taken_from_the_last_evaluation_on_the_basis(store: Store) -> None:
    basis = Basis("s", "p")
    assert discordant_share(store, basis) is None
    decided(store, basis)
    assert discordant_share(store, basis) == pytest.approx(0.25)
    assert discordant_share(store, Basis("s", "q")) is None
    decided(store, basis, num_gained=0, num_lost=0)
    assert discordant_share(store, basis) == pytest.approx(1 / 40)
