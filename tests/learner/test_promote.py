"""The promote stage against a real server: the decision on the record, and only the right adapter becomes active."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from nightschool_learner import records, report
from nightschool_learner.errors import StageFailedError
from nightschool_learner.evaluation_records import evaluation_of
from nightschool_learner.evaluation_results import TaskResult, insert_results
from nightschool_learner.held_out import basis_of, held_out_tasks
from nightschool_learner.promote import PromoteStage
from nightschool_learner.stages import Cycle

from tests.learner.candidate_home import SMALL_GATE, World, add_adapter, fresh, world
from tests.learner.training_data import Trained

pytestmark = pytest.mark.asyncio(loop_scope="module")

_scales = iter(1 + 0.01 * i for i in range(1, 100))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("home")) as made:
        yield made


async def measured_cycle(served: World, trained: Trained, solved: int, *overrides: str) -> tuple[Cycle, str]:
    """A cycle whose fresh candidate solved the first `solved` of 16 tasks; the incumbent solved 8."""
    cycle = served.cycle(*SMALL_GATE, *overrides)
    candidate = await add_adapter(served, trained, scale=next(_scales))
    records.set_candidate(served.store, cycle.id, candidate)
    held_out = held_out_tasks(cycle)
    basis = await basis_of(cycle, held_out)
    for adapter, count in ((candidate, solved), (cycle.incumbent, 8)):
        results = [
            (adapter, TaskResult(task.id, task.family, i < count, task.answer, "answered", 2, 0, 40))
            for i, task in enumerate(held_out.tasks)
        ]
        insert_results(served.store, basis, cycle.id, results)
    return cycle, candidate


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def clean(served: World) -> AsyncIterator[None]:
    """Every test begins and ends on the base model, without an open cycle and without measurements."""
    yield
    row = records.open_cycle(served.store)
    if row is not None:
        records.finish(served.store, row.id, "cancelled", "end of the test")
    await served.client.admin.adapters.promote("base", reason="end of the test", force=True)
    with served.store.transaction() as db:
        db.execute("DELETE FROM evaluation_results")


async def state_of(served: World, name: str) -> str:
    return str((await served.client.admin.adapters.get(name)).state)


async def test_a_candidate_that_passes_becomes_active(served: World, trained: Trained) -> None:
    cycle, candidate = await measured_cycle(served, trained, 15)
    ending = await PromoteStage().run(cycle)
    assert ending is not None
    assert ending.state == "promoted"
    assert f"{candidate} replaced base in" in ending.outcome
    assert "held-out success 50.0% -> 93.8% (n 16, 95% interval of the difference" in ending.outcome
    assert records.active_adapter(served.store) == candidate
    assert await state_of(served, candidate) == "active"
    row = evaluation_of(served.store, cycle.id)
    assert row is not None
    assert (row.passed, row.num_gained, row.num_lost, row.n) == (True, 7, 0, 16)
    assert len(row.reasons) == len(row.rules) == 14
    assert next(str(rule) for rule in row.rules if rule.name == "difference") in row.reasons
    assert row.thresholds["gate"]["min_n"] == 4
    assert (row.set_version, row.notes) == (1, ())
    assert row.ability is not None
    assert row.ability.num_tokens > 200
    assert row.ability.base == row.ability.incumbent != row.ability.candidate
    reported = report.build(served.store, cycle.id)["evaluation"]
    assert [rule["value"] for rule in reported["rules"]] == [rule.value for rule in row.rules]
    assert reported["thresholds"] == row.thresholds
    shown = (await served.client.admin.cycles.get(cycle.id)).evaluation
    assert shown is not None
    assert [(rule.name, rule.held, rule.value) for rule in shown.rules] == [
        (r.name, r.held, r.value) for r in row.rules
    ]
    assert shown.ability is not None
    assert shown.ability.candidate == row.ability.candidate
    assert (shown.set_version, shown.detectable) == (1, row.detectable)
    assert {family.family: family.num_gained for family in shown.families} == {
        family["family"]: family["num_gained"] for family in row.families
    }
    assert [family["family"] for family in row.families] == ["left", "sum"]
    adapter = await served.client.admin.adapters.get(candidate)
    assert adapter.evaluation is not None
    assert adapter.evaluation.p_value == row.p_value
    assert (cycle.folder / "plots" / "evaluation.png").read_bytes().startswith(b"\x89PNG")

    again = await PromoteStage().run(fresh(cycle))
    assert again is not None
    assert again.state == "promoted"
    assert len(served.store.query("SELECT id FROM evaluations WHERE cycle_id = ?", (cycle.id,))) == 1


async def test_a_candidate_that_fails_is_rejected_and_the_incumbent_serves_on(served: World, trained: Trained) -> None:
    cycle, candidate = await measured_cycle(served, trained, 3)
    ending = await PromoteStage().run(cycle)
    assert ending is not None
    assert ending.state == "rejected"
    assert f"{candidate} did not pass: difference: success 50.0% -> 18.8%" in ending.outcome
    assert records.active_adapter(served.store) == "base"
    assert await state_of(served, candidate) == "rejected"
    events = (await served.client.admin.adapters.get(candidate)).events
    assert any(event.action == "reject" and cycle.id in event.reason for event in events)
    again = await PromoteStage().run(fresh(cycle))
    assert again == ending


async def test_a_candidate_is_not_promoted_over_another_incumbent_than_it_beat(served: World, trained: Trained) -> None:
    cycle, candidate = await measured_cycle(served, trained, 15)
    other = await add_adapter(served, trained, scale=next(_scales))
    await served.client.admin.adapters.promote(other, reason="by hand", force=True)
    ending = await PromoteStage().run(cycle)
    assert ending is not None
    assert ending.state == "stopped"
    assert f"passed against base, but {other} is active by now" in ending.outcome
    assert records.active_adapter(served.store) == other
    assert await state_of(served, candidate) == "candidate"


async def test_where_approval_is_manual_a_candidate_waits(served: World, trained: Trained) -> None:
    cycle, candidate = await measured_cycle(served, trained, 15, "promote.approval=manual")
    ending = await PromoteStage().run(cycle)
    assert ending is not None
    assert ending.state == "stopped"
    assert f"`nightschool adapters promote {candidate}`" in ending.outcome
    assert await state_of(served, candidate) == "candidate"
    await served.client.admin.adapters.promote(candidate, reason="approved")
    assert records.active_adapter(served.store) == candidate


async def test_an_incomplete_measurement_is_no_decision(served: World, trained: Trained) -> None:
    cycle, candidate = await measured_cycle(served, trained, 15)
    with served.store.transaction() as db:
        db.execute("DELETE FROM evaluation_results WHERE adapter = ? AND task_id = 'sum-0'", (candidate,))
    with pytest.raises(StageFailedError, match="there are 16 of 16 of the incumbent and 15 of the candidate"):
        await PromoteStage().run(cycle)
    assert evaluation_of(served.store, cycle.id) is None


async def test_the_decision_is_made_once(served: World, trained: Trained) -> None:
    cycle, candidate = await measured_cycle(served, trained, 15)
    await PromoteStage().run(cycle)
    decided = evaluation_of(served.store, cycle.id)
    with served.store.transaction() as db:
        db.execute("UPDATE evaluation_results SET success = 0 WHERE adapter = ?", (candidate,))
    await PromoteStage().run(fresh(cycle))
    assert evaluation_of(served.store, cycle.id) == decided
    stored = served.store.one("SELECT reasons FROM evaluations WHERE cycle_id = ?", (cycle.id,))
    assert stored is not None
    assert tuple(json.loads(stored["reasons"])) == (decided.reasons if decided else ())
