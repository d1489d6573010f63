"""The evaluate stage against a real server: every (set, adapter, task) is measured once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from nightschool_learner import records
from nightschool_learner.decision import recorded_decision
from nightschool_learner.errors import CycleCancelledError
from nightschool_learner.evaluate import EvaluateStage, Results
from nightschool_learner.evaluation_records import evaluation_of
from nightschool_learner.evaluation_results import GREEDY, Basis, TaskResult, insert_results, results_of, turns_of_tasks
from nightschool_learner.examiner import judge, read_images
from nightschool_learner.held_out import basis_of, held_out_tasks, plan_of
from nightschool_learner.stages import Cycle
from nightschool_server import chat
from nightschool_server.agent.episode import EpisodeResult, Usage
from nightschool_server.app import App, EvaluationTask
from nightschool_server.chat import ToolCall
from nightschool_server.tools.state import ToolState

from tests.learner.cancelling import cancelled_while_locked
from tests.learner.candidate_home import World, add_adapter, fresh, world
from tests.learner.training_data import Trained, picture

pytestmark = pytest.mark.asyncio(loop_scope="module")

_scales = iter(1 + 0.01 * i for i in range(100))
"""So that every test has a candidate of its own."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def cycle(served: World, trained: Trained) -> AsyncIterator[Cycle]:
    """A cycle with a candidate of its own, ended with the test."""
    made = served.cycle("evaluate.concurrency=8", "evaluate.num_seeds=0")
    records.set_candidate(served.store, made.id, await add_adapter(served, trained, scale=next(_scales)))
    yield made
    records.finish(served.store, made.id, "cancelled", "end of the test")


@pytest_asyncio.fixture(loop_scope="module")
async def basis(cycle: Cycle) -> Basis:
    return await basis_of(cycle, held_out_tasks(cycle))


async def test_both_adapters_answer_every_task_and_later_cycles_reuse_the_incumbent(
    served: World, cycle: Cycle, basis: Basis, trained: Trained
) -> None:
    assert await EvaluateStage().run(cycle) is None
    candidate = records.candidate_of(served.store, cycle.id)
    assert candidate is not None
    ids = {task.id for task in held_out_tasks(cycle).tasks}
    measured = {name: results_of(served.store, basis, name) for name in (candidate, "base")}
    assert set(measured[candidate]) == set(measured["base"]) == {(id_, GREEDY) for id_ in ids}
    assert all(result.num_steps >= 1 and result.completion_tokens > 0 for result in measured["base"].values())
    assert {result.family for result in measured["base"].values()} == {"sum", "left"}
    ways = turns_of_tasks(served.store, basis, candidate, sorted(ids))
    assert set(ways) == ids, "how it came to each greedy answer is kept"
    assert all(
        ways[id_][-1].who == "assistant" or result.outcome != "answered"
        for (id_, _), result in measured[candidate].items()
    )
    row = served.progress(cycle, "evaluate")
    assert row["num_total"] == 2 * len(ids)

    assert await EvaluateStage().run(fresh(cycle)) is None
    assert results_of(served.store, basis, candidate) == measured[candidate]
    records.finish(served.store, cycle.id, "rejected", "first")

    second = served.cycle("evaluate.num_seeds=0")
    records.set_candidate(served.store, second.id, await add_adapter(served, trained, scale=1.5))
    assert await EvaluateStage().run(second) is None
    assert json.loads(served.progress(second, "evaluate")["counts"])["reused"] == len(ids)
    by_cycle = served.store.query("SELECT cycle_id, COUNT(*) AS n FROM evaluation_results GROUP BY cycle_id ORDER BY n")
    assert {row["cycle_id"]: row["n"] for row in by_cycle} == {second.id: len(ids), cycle.id: 2 * len(ids)}
    records.finish(served.store, second.id, "rejected", "second")


async def test_sampled_answers_come_from_the_same_seeds_for_both_adapters_and_are_reused(
    served: World, trained: Trained
) -> None:
    settings = ("evaluate.num_seeds=2", "evaluate.max_sampled_tasks=4", "evaluate.max_tokens=48")
    cycle = served.cycle(*settings)
    twin = await add_adapter(served, trained, scale=next(_scales))
    records.set_candidate(served.store, cycle.id, twin)
    basis = await basis_of(cycle, held_out_tasks(cycle))
    assert await EvaluateStage().run(cycle) is None
    before, after = (results_of(served.store, basis, name) for name in ("base", twin))
    drawn = sorted(key for key in before if key[1] != GREEDY)
    assert drawn == [(task, draw) for task in ("left-0", "left-1", "sum-0", "sum-1") for draw in (1, 2)]
    assert set(after) == set(before)
    assert all(result.actions and len(result.actions) == result.num_steps for result in before.values())

    with served.store.transaction() as db:
        db.execute("DELETE FROM evaluation_results WHERE adapter = 'base' AND draw > 0")
    assert await EvaluateStage().run(fresh(cycle)) is None
    assert results_of(served.store, basis, "base") == before
    row = await recorded_decision(cycle, twin)
    assert row.sampled is not None
    assert (row.sampled.num_tasks, row.sampled.num_draws) == (4, 2)
    assert row == evaluation_of(served.store, cycle.id)
    shown = (await served.client.admin.cycles.get(cycle.id)).evaluation
    assert shown is not None
    assert shown.sampled is not None
    assert shown.sampled.incumbent is not None
    assert shown.sampled.incumbent.pass_at == row.sampled.incumbent.pass_at
    assert shown.sampled.reading == row.sampled.reading
    with served.store.transaction() as db:
        db.execute("DELETE FROM evaluations")
    records.finish(served.store, cycle.id, "rejected", "sampled")


async def test_a_hopeless_candidate_is_given_up_at_a_look_and_the_rest_is_not_measured(
    served: World, trained: Trained
) -> None:
    settings = ("gate.early_stop=true", "gate.first_look=4", "gate.look_every=4", "gate.futility_difference=0.9")
    cycle = served.cycle(*settings, "evaluate.num_seeds=2")
    candidate = await add_adapter(served, trained, scale=next(_scales))
    records.set_candidate(served.store, cycle.id, candidate)
    assert await EvaluateStage().run(cycle) is None
    basis = await basis_of(cycle, held_out_tasks(cycle))
    plan = plan_of(cycle, held_out_tasks(cycle))
    row = await recorded_decision(cycle, candidate)
    assert row.early_stop is not None
    assert (row.early_stop.verdict, row.early_stop.num_planned, row.n) == ("futile", 16, row.early_stop.n)
    assert row.n in (4, 8, 12)
    assert set(results_of(served.store, basis, candidate)) == set(plan.greedy(row.n))
    assert f"futile after {row.n} of 16 tasks" in served.progress(cycle, "evaluate")["message"]
    shown = (await served.client.admin.cycles.get(cycle.id)).evaluation
    assert shown is not None
    assert shown.early_stop is not None
    assert shown.early_stop.e_futile == row.early_stop.e_futile
    assert not shown.passed
    with served.store.transaction() as db:
        db.execute("DELETE FROM evaluations")
    records.finish(served.store, cycle.id, "rejected", "futile")


async def test_tasks_without_answers_are_judged_by_a_model_in_both_orders(
    served: World, trained: Trained, tmp_path: Path
) -> None:
    path = tmp_path / "open.jsonl"
    tasks = [{"id": f"open-{i}", "family": "open", "prompt": f"What is {i + 2} plus {i + 3}?"} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, tasks)))
    settings = ("gate.judge.rubric=step-1", "gate.judge.margin_nats=0", "gate.min_n=4")
    cycle = served.cycle(*settings)
    cycle = replace(cycle, app=replace(cycle.app, evaluation=path))
    candidate = await add_adapter(served, trained, scale=next(_scales))
    records.set_candidate(served.store, cycle.id, candidate)
    ending = await EvaluateStage().run(cycle)
    assert ending is not None
    assert "the judge served/base is the training critic" in ending.outcome

    limits = cycle.config.gate.model_copy(update={"allow_training_critic": True})
    allowed = replace(cycle, config=cycle.config.model_copy(update={"gate": limits}))
    assert await EvaluateStage().run(allowed) is None
    row = await recorded_decision(allowed, candidate)
    assert row.judge is not None
    assert row.judge.is_training_critic
    assert row.judge.num_won + row.judge.num_lost + row.judge.num_tied == row.n == 6
    assert row.sampled is None
    assert row.thresholds["gate"]["allow_training_critic"]
    shown = (await served.client.admin.cycles.get(cycle.id)).evaluation
    assert shown is not None
    assert shown.judge is not None
    assert (shown.judge.win_rate, shown.judge.num_asked) == (row.judge.win_rate, row.judge.num_asked)
    with served.store.transaction() as db:
        db.execute("DELETE FROM evaluations")
    records.finish(served.store, cycle.id, "rejected", "judged")


async def test_results_of_another_application_or_other_limits_are_not_reused(served: World, cycle: Cycle) -> None:
    held_out = held_out_tasks(cycle)
    same = await basis_of(cycle, held_out)
    said_otherwise = replace(cycle, app=replace(cycle.app, system_prompt="You help."))
    shorter = cycle.config.evaluate.model_copy(update={"max_tokens": 7})
    cut = replace(cycle, config=cycle.config.model_copy(update={"evaluate": shorter}))
    bases = [same, await basis_of(said_otherwise, held_out), await basis_of(cut, held_out)]
    assert len(set(bases)) == 3
    assert await basis_of(cycle, held_out) == same


async def test_a_resumed_stage_measures_only_what_is_left(served: World, cycle: Cycle, basis: Basis) -> None:
    candidate = records.candidate_of(served.store, cycle.id)
    assert candidate is not None
    done = TaskResult("sum-0", "sum", True, "kept", "answered", 1, 0, 5)
    insert_results(served.store, basis, cycle.id, [(candidate, done)])
    assert await EvaluateStage().run(cycle) is None
    assert results_of(served.store, basis, candidate)["sum-0", GREEDY] == done
    assert len(results_of(served.store, basis, candidate)) == len(held_out_tasks(cycle).tasks)


async def test_a_cancelled_stage_keeps_what_it_measured(served: World, cycle: Cycle, basis: Basis) -> None:
    progress = cycle.progress("evaluate")
    advance = progress.advance

    def count(units: int = 1, **counts: int) -> None:
        advance(units, **counts)
        if progress.num_done == progress.num_total - len(held_out_tasks(cycle).tasks) + 3:
            cycle.cancelled.set()

    progress.advance = count  # type: ignore[method-assign]
    with pytest.raises(CycleCancelledError):
        await EvaluateStage().run(cycle)
    candidate = records.candidate_of(served.store, cycle.id)
    assert candidate is not None
    kept = results_of(served.store, basis, candidate)
    assert len(kept) >= 3
    again = fresh(cycle)
    again.progress("evaluate").advance = advance  # type: ignore[method-assign]
    assert await EvaluateStage().run(again) is None
    whole = results_of(served.store, basis, candidate)
    assert len(whole) == len(held_out_tasks(cycle).tasks)
    assert {key: whole[key] for key in kept} == kept


async def test_results_that_are_being_written_are_there_before_a_cancelled_stage_ends(
    served: World, cycle: Cycle
) -> None:
    basis, plan = Basis("cut off", ""), plan_of(cycle, held_out_tasks(cycle))
    results = Results(cycle, basis, plan, cycle.progress("evaluate"), ("0001-aaaa", "base"))
    results.begin()
    await results.add("base", TaskResult("sum-0", "sum", True, "kept", "answered", 1, 0, 5))
    await cancelled_while_locked(served.store, results.flush())
    assert set(results_of(served.store, basis, "base")) == {("sum-0", GREEDY)}


async def test_held_out_tasks_leave_no_trace_among_what_is_learned_from(served: World, cycle: Cycle) -> None:
    assert await EvaluateStage().run(cycle) is None
    logged = served.store.query("SELECT policy FROM requests")
    assert {row["policy"] for row in logged} <= {"no_log"}
    assert served.store.query("SELECT * FROM messages") == []
    assert served.store.query("SELECT * FROM blobs") == []


async def test_without_held_out_tasks_the_cycle_stops_with_the_remedy(served: World, cycle: Cycle) -> None:
    ending = await EvaluateStage().run(replace(cycle, app=replace(cycle.app, evaluation=None)))
    assert ending is not None
    assert ending.state == "stopped"
    assert "give App(evaluation=Path(...))" in ending.outcome


async def test_fewer_tasks_where_configured_and_always_the_same_ones(served: World, cycle: Cycle) -> None:
    config = cycle.config.model_copy(update={"evaluate": cycle.config.evaluate.model_copy(update={"max_tasks": 3})})
    few = held_out_tasks(replace(cycle, config=config))
    assert [task.id for task in few.tasks] == ["left-0", "left-1", "left-2"]


async def test_adapters_are_interleaved_and_the_detectable_difference_is_said_first(
    served: World, cycle: Cycle
) -> None:
    plan = plan_of(cycle, held_out_tasks(cycle))
    results = Results(cycle, Basis("another set", ""), plan, cycle.progress("evaluate"), ("0001-aaaa", "base"))
    results.begin()
    units = results.missing(plan.keys(plan.n))
    assert [adapter for _, adapter in units[:4]] == ["0001-aaaa", "base", "0001-aaaa", "base"]
    assert units[0][0] == units[1][0]
    assert "n 16 finds differences of 25.0 points or more" in cycle.progress("evaluate").message
    assert cycle.progress("evaluate").counts["detectable_per_mille"] == 250


@pytest.mark.parametrize(
    ("outcome", "answer", "success"),
    [("answered", "36", True), ("answered", "$36.00", True), ("answered", "37", False), ("max_tokens", "36", False)],
)
async def test_an_episode_is_solved_by_a_right_final_answer_alone(
    tmp_path: Path, outcome: str, answer: str, success: bool
) -> None:
    state = ToolState.initial(App(name="empty", system_prompt=""), tmp_path)
    episode = EpisodeResult(outcome, "", answer, (), (), Usage(7, 3), state)  # type: ignore[arg-type]
    result = judge(EvaluationTask("t1", "tag", "How much?", "36", "number"), episode)
    assert (result.success, result.outcome, result.completion_tokens) == (success, outcome, 3)
    assert result.num_simulated == 0
    call = ToolCall("call_0", "book", "{}")
    booked = (chat.tool_result(call, "booked", simulated=True), chat.tool_result(call, "12"))
    assert judge(EvaluationTask("t1", "tag", "How much?", "36"), replace(episode, messages=booked)).num_simulated == 1


async def test_pictures_are_read_in_order(tmp_path: Path) -> None:
    paths = []
    for colour in ("red", "blue"):
        paths.append(tmp_path / f"{colour}.png")
        paths[-1].write_bytes(picture(colour))
    task = EvaluationTask("t1", "colour", "Which?", "red", images=tuple(paths))
    assert list(read_images(task).values()) == [path.read_bytes() for path in paths]
