"""Exploration on the real store and real tool workers, with answers and verdicts made by hand."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner import practice_counts, records, seed_records
from nightschool_learner.errors import CycleCancelledError, NothingToLearnError
from nightschool_learner.explore import CritiqueStage, ExploreStage
from nightschool_learner.seed_records import KEPT
from nightschool_learner.stages import Cycle
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import ToolResult, messages_from_json, template_messages
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.store import Store

from tests.learner.practice_home import (
    DiedError,
    FakeCritic,
    FakeSampler,
    cycle_on,
    dump,
    log_request,
    open_home,
    without_clocks,
)

ROWS = ("rollouts", "steps", "candidates", "critiques")
MUG = write_call("price", {"item": "mug"})
NONE = write_call("price", {"item": "none"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def with_tasks(store: Store, *prompts: str, overrides: tuple[str, ...] = ()) -> Cycle:
    cycle = cycle_on(store, "explore.concurrency=2", *overrides)
    if not seed_records.tasks_of(store, cycle.id):
        log_request(store, "seed", "What does one mug cost?")
        with store.transaction() as db:
            for slot, prompt in enumerate(prompts):
                seed_records.insert_task(db, cycle.id, seed_records.new_task(slot, prompt, (), KEPT), [], [])
    return cycle


def stage(sampler: FakeSampler, critic: FakeCritic | None = None) -> ExploreStage:
    return ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(critic or FakeCritic()))


def observations(prompt: Prompt) -> list[str]:
    return [part.content for message in prompt.messages for part in message.parts if isinstance(part, ToolResult)]


def price_then_answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
    """Looks the mug up, then answers; hot samples also try a missing item, then a shorter and a longer answer."""
    seen = observations(prompt)
    if not seen:
        return MUG if sampling.n == 1 else [MUG, NONE, "12", "<tool_call>{"][index]
    return seen[-1] if sampling.n == 1 else [seen[-1], "It is 12", "12 or", "?"][index]


async def test_a_step_is_one_cold_and_several_hot_samples_of_the_incumbent(store: Store) -> None:
    sampler = FakeSampler(price_then_answer)
    await stage(sampler).run(with_tasks(store, "What is a mug?"))
    first = [(sampling.temperature, sampling.n, sampling.top_p) for _, sampling, _ in sampler.calls[:2]]
    assert first == [(0.7, 1, 0.8), (1.2, 4, 0.8)]
    assert {adapter for _, _, adapter in sampler.calls} == {"base"}
    seeds = [sampling.seed for _, sampling, _ in sampler.calls]
    assert len(set(seeds)) == len(seeds)


async def test_equal_actions_are_one_candidate_and_facts_come_before_the_critic(store: Store) -> None:
    critic = FakeCritic()
    await stage(FakeSampler(price_then_answer), critic).run(with_tasks(store, "What is a mug?"))
    rows = store.query(
        "SELECT c.*, s.picked, s.picked_by FROM candidates c JOIN steps s ON s.id = c.step_id WHERE s.position = 0"
    )
    assert [(row["text"], row["num_samples"], row["failure"], row["final"]) for row in rows] == [
        (MUG, 2, "", 0),
        (NONE, 1, "execution", 0),
        ("12", 1, "", 1),
        ("<tool_call>{", 1, "parse", 0),
    ]
    assert [row["observation"] for row in rows[:2]] == ["12", "error: no item is called 'none'"]
    assert (rows[0]["picked"], rows[0]["picked_by"]) == (0, "critic")
    asked = {view.action for _, first, second in critic.calls for view in (first, second)}
    assert NONE not in asked
    assert "<tool_call>{" not in asked


async def test_the_trajectory_goes_on_from_the_pick_until_an_answer(store: Store) -> None:
    cycle = with_tasks(store, "What is a mug?")
    await stage(FakeSampler(price_then_answer)).run(cycle)
    [rollout] = store.query("SELECT * FROM rollouts")
    assert (rollout["state"], rollout["outcome"], rollout["answer"]) == ("done", "answered", "It is 12")
    histories = [json.loads(row["history"]) for row in store.query("SELECT history FROM steps ORDER BY position")]
    assert [len(history) for history in histories] == [2, 4]
    assert histories[0][0] == {"role": "system", "parts": [{"type": "text", "text": "Help."}]}
    assert histories[1][-1]["parts"][0]["content"] == "12"


async def test_candidates_that_agree_cost_no_critic_and_a_cycle_of_them_stops(store: Store) -> None:
    critic = FakeCritic()
    with pytest.raises(NothingToLearnError, match="no step had two different actions"):
        await stage(FakeSampler(lambda prompt, sampling, index: "12"), critic).run(with_tasks(store, "What is a mug?"))
    assert critic.calls == []
    assert [row["picked_by"] for row in store.query("SELECT picked_by FROM steps")] == ["agreed"]


async def test_each_candidate_writes_into_a_fork_of_its_own_and_only_the_pick_is_kept(store: Store) -> None:
    def notes(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if len(observations(prompt)) == 2:
            return "done" if sampling.n == 1 else "done!"
        return write_call("note", {"text": "x" * (1 if sampling.n == 1 else index + 2)})

    await stage(FakeSampler(notes)).run(with_tasks(store, "Take notes"))
    rows = store.query(
        "SELECT c.observation, s.position FROM candidates c JOIN steps s ON s.id = c.step_id WHERE NOT final"
    )
    first = [row["observation"] for row in rows if row["position"] == 0]
    second = [row["observation"] for row in rows if row["position"] == 1]
    assert first == ["1: x;", "1: xx;", "1: xxx;", "1: xxxx;", "1: xxxxx;"]
    assert second == [f"2: xxxxx;{'x' * n};" for n in range(1, 6)], "all continue from the longest, the pick"
    assert not list((store.home.cycles).glob("*/workspaces/*")), "nothing is left behind"


async def test_a_tool_that_changes_the_world_is_never_run_in_practice(store: Store, ordered: Path) -> None:
    order = write_call("order", {"item": "mug"})

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        return order if sampling.n == 1 or index else "no"

    cycle = with_tasks(store, "Order a mug")
    await stage(FakeSampler(answer)).run(cycle)
    assert not await asyncio.to_thread(ordered.exists)
    [refused] = store.query("SELECT * FROM candidates WHERE text = ?", (order,))
    assert refused["failure"] == "refused"
    assert store.query("SELECT picked, picked_by FROM steps") == [{"picked": 1, "picked_by": "facts"}]

    other = with_tasks(open_home(store.home.path / "other"), "Order a lamp")
    with pytest.raises(NothingToLearnError):
        await stage(FakeSampler(lambda *_: order)).run(other)
    assert [row["outcome"] for row in other.store.query("SELECT outcome FROM rollouts")] == ["refused"]


async def test_a_simulator_answers_for_a_tool_that_changes_the_world_and_every_row_that_rests_on_it_says_so(
    store: Store,
) -> None:
    suite, attic = write_call("book", {"room": "suite"}), write_call("book", {"room": "attic"})

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if observations(prompt):
            return "done" if sampling.n == 1 else "it is done"
        return suite if sampling.n == 1 else [attic, MUG, suite, suite][index]

    cycle = with_tasks(store, "Book the suite")
    await stage(FakeSampler(answer)).run(cycle)
    rows = store.query(
        "SELECT c.*, s.simulated AS after_simulated FROM candidates c JOIN steps s ON s.id = c.step_id "
        "ORDER BY s.position, c.position"
    )
    assert [(r["text"], r["observation"], r["failure"], r["simulated"], r["after_simulated"]) for r in rows] == [
        (suite, "booked suite", "", 1, 0),
        (attic, "error: there is no attic", "execution", 1, 0),
        (MUG, "12", "", 0, 0),
        ("done", "", "", 0, 1),
        ("it is done", "", "", 0, 1),
    ]
    [later] = store.query("SELECT history FROM steps WHERE position = 1")
    assert json.loads(later["history"])[-1]["parts"][0]["simulated"] is True
    assert template_messages(messages_from_json(later["history"]))[-1] == {
        "role": "tool",
        "name": "book",
        "content": "booked suite",
    }, "the model sees what it would have seen of the tool"
    cycle.progress("explore").flush()
    shown = records.stage_counts(store, cycle.id, "explore")["simulated"]
    assert shown == practice_counts.explore_counts(store, cycle.id)["simulated"] == 2


async def test_a_workspace_that_cannot_be_copied_ends_its_rollout_and_no_other(store: Store) -> None:
    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if "mug" in prompt.messages[1].text:
            return price_then_answer(prompt, sampling, index)
        return write_call("dig", {})

    cycle = with_tasks(store, "Dig", "What is a mug?")
    await stage(FakeSampler(answer)).run(cycle)
    ended = store.query("SELECT r.state, r.outcome FROM rollouts r JOIN tasks t ON t.id = r.task_id ORDER BY t.slot")
    assert [tuple(row.values()) for row in ended] == [("failed", "uncopyable_workspace"), ("done", "answered")]
    assert not list(store.home.cycles.glob("*/workspaces/*")), "what no path reaches is removed all the same"


@pytest.mark.parametrize("die_at", range(9))
@pytest.mark.parametrize("who", ["sampler", "critic"])
async def test_a_killed_exploration_resumes_and_pays_for_nothing_twice(store: Store, who: str, die_at: int) -> None:
    tasks = ("What is a mug?", "And the mug?", "A mug, then?")
    whole_sampler, whole_critic = FakeSampler(price_then_answer), FakeCritic()
    whole = open_home(store.home.path / "whole")
    await stage(whole_sampler, whole_critic).run(with_tasks(whole, *tasks))

    sampler, critic = FakeSampler(price_then_answer), FakeCritic()
    (sampler if who == "sampler" else critic).die_at = die_at
    with pytest.raises(DiedError):
        await stage(sampler, critic).run(with_tasks(store, *tasks))
    before = {table: dump(store, table) for table in ("candidates", "critiques")}
    num_paid = len(critic.calls)
    sampler.die_at = critic.die_at = None
    await stage(sampler, critic).run(with_tasks(store))
    for table, rows in before.items():
        assert set(rows) <= set(dump(store, table)), f"{table} written before the kill stay as they were"
    for table in ROWS:
        count = f"SELECT COUNT(*) AS n FROM {table}"
        assert store.query(count) == whole.query(count), table
    assert num_paid >= len(before["critiques"])
    assert len(critic.calls) == len(whole_critic.calls)
    # Each of two workers lost at most the step in flight, which is two calls.
    assert len(sampler.calls) - len(whole_sampler.calls) < 4


async def test_progress_counts_what_happened_and_survives_a_restart(store: Store) -> None:
    cycle = with_tasks(store, "What is a mug?", "The mug?")
    await stage(FakeSampler(price_then_answer)).run(cycle)
    await CritiqueStage().run(cycle)
    cycle.progress("explore").flush()
    explore = records.stage_counts(store, cycle.id, "explore")
    assert explore["samples"] == 20
    assert explore["distinct_actions"] == store.query("SELECT COUNT(*) AS n FROM candidates")[0]["n"]
    assert explore["failed_parse"] == 2
    assert explore["answered"] == 2
    assert explore["picked_by_critic"] == 4
    critique = records.stage_counts(store, cycle.id, "critique")
    num_critiques = practice_counts.num_critiques(store, cycle.id)
    assert critique["verdict_first"] + critique["verdict_second"] == num_critiques
    before = (without_clocks(explore), critique)
    again = with_tasks(store)
    await stage(FakeSampler(price_then_answer)).run(again)
    await CritiqueStage().run(again)
    explore, critique = (records.stage_counts(store, cycle.id, name) for name in ("explore", "critique"))
    assert (without_clocks(explore), critique) == before


async def test_abstentions_are_counted_by_reason(store: Store) -> None:
    cycle = with_tasks(store, "What is a mug?", overrides=("critic.margin_nats=1000",))
    await stage(FakeSampler(price_then_answer)).run(cycle)
    await CritiqueStage().run(cycle)
    counts = records.stage_counts(store, cycle.id, "critique")
    assert (
        counts["abstained_margin"]
        == store.query("SELECT COUNT(*) AS n FROM steps WHERE picked_by = 'fallback'")[0]["n"]
    )


async def test_a_cancelled_exploration_stops(store: Store) -> None:
    cycle = with_tasks(store, "What is a mug?", "The mug?", "A mug")

    def cancel(prompt: Prompt, sampling: Sampling, index: int) -> str:
        cycle.cancelled.set()
        return price_then_answer(prompt, sampling, index)

    with pytest.raises(CycleCancelledError):
        await stage(FakeSampler(cancel)).run(cycle)


async def test_a_tool_that_answers_otherwise_after_a_restart_starts_the_rest_of_its_rollout_anew(store: Store) -> None:
    cycle = with_tasks(store, "What is a mug?")
    sampler = FakeSampler(price_then_answer, die_at=3)
    with pytest.raises(DiedError):
        await stage(sampler).run(cycle)
    store.connection.execute("UPDATE steps SET history = replace(history, '\"12\"', '\"13\"') WHERE position = 1")
    sampler.die_at = None
    await stage(sampler).run(cycle)
    [row] = store.query("SELECT history FROM steps WHERE position = 1")
    assert '"content":"12"' in row["history"]
