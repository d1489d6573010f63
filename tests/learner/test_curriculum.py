"""Families of tasks on the real store: a cycle's practice becomes rows, and rows the next cycle's choice of seeds."""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner import curriculum, records, seed_records
from nightschool_learner.curriculum import families_of_cycle, families_of_seeds, known_families, write_families
from nightschool_learner.explore import ExploreStage
from nightschool_learner.families import Family, draw, family_of, merged, weight_of
from nightschool_learner.pairs import PairsStage
from nightschool_learner.prompts import WrittenTask, write_task
from nightschool_learner.sampling import derive_seed
from nightschool_learner.seed_records import KEPT, Seed
from nightschool_learner.seeds import SeedsStage
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesize import SynthesizeStage
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import ToolCall, ToolResult, assistant, system, tool_result, user
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.request_rows import LoggedMessage, RequestRecord, insert_request
from nightschool_server.store.store import Store

from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, dump, log_request, open_home

MUG, NOTE = write_call("price", {"item": "mug"}), write_call("note", {"text": "a mug"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def log_calls(store: Store, name: str, prompt: str, *tools: str, fails: str = "") -> str:
    """Log an answered task that called `tools`."""
    turns = [system("Help."), user(prompt)]
    for number, tool in enumerate((*tools, *([fails] if fails else []))):
        call = ToolCall(f"call_{number}", tool, "{}")
        turns += [assistant("calls"), tool_result(call, "12", is_error=tool == fails)]
    record = RequestRecord(
        id=f"resp_{name}", method="task", caller="tester", adapter="base", policy="train", status="OK",
        created_at=time.time(), ended_at=time.time(), outcome="answered",
        messages=tuple(LoggedMessage(turn) for turn in (*turns, assistant("12"))),
    )  # fmt: skip
    with store.transaction() as db:
        insert_request(db, record)
    return record.id


def ended(cycle: Cycle) -> None:
    records.finish(cycle.store, cycle.id, "stopped", "test")


def with_families(store: Store, *found: tuple[str, int, float]) -> None:
    """A cycle that has ended, with these families."""
    cycle = cycle_on(store)
    with store.transaction() as db:
        db.executemany(
            "INSERT INTO families (cycle_id, family, num_tasks, solve_rate, num_pairs, seen_at) "
            "VALUES (?, ?, ?, ?, 1, 0)",
            [(cycle.id, *family) for family in found],
        )
    ended(cycle)


def test_a_family_is_the_tools_that_were_called_and_what_was_brought() -> None:
    assert family_of(["look_up", "add", "look_up"], (), ()) == "add+look_up/text"
    assert family_of([], ["picture"], ()) == "none/image"
    assert family_of(["read"], ["picture"], ["table"]) == "read/image+file"


def test_a_seed_s_family_is_told_by_what_its_request_called(store: Store) -> None:
    ids = [
        log_calls(store, "a", "What does a mug cost?", "price"),
        log_calls(store, "b", "Note the price of two mugs", "price", "note", "price"),
        log_calls(store, "c", "Just say hello", fails="price"),
    ]
    seeds = [Seed(response_id, "x", ("picture",) if i == 2 else (), "traffic") for i, response_id in enumerate(ids)]
    assert families_of_seeds(store, seeds) == ["price/text", "note+price/text", "none/image"]


def shop(prompt: Prompt, sampling: Sampling, index: int) -> str:
    """Always looks a mug up for the first task, now and then for the second; never ends the third."""
    task = next(message.text for message in prompt.messages if message.role == "user")
    has_looked = any(isinstance(part, ToolResult) for message in prompt.messages for part in message.parts)
    if task == "loops":
        return NOTE
    if not has_looked:
        return MUG if task == "easy" or index % 2 == 0 else "maybe 11 or so"
    return "It is 12."


async def practised(store: Store) -> Cycle:
    cycle = cycle_on(store, "explore.num_candidates=5", "pairs.min_pairs=1")
    with store.transaction() as db:
        for slot, prompt in enumerate(("easy", "edge", "loops", "dropped")):
            state = KEPT if prompt != "dropped" else "length"
            seed_records.insert_task(db, cycle.id, seed_records.new_task(slot, prompt, (), state), [], [])
    critic = FakeCritic()
    await ExploreStage(lambda _: FakeSampler(shop), lambda cycle, _: nullcontext(critic)).run(cycle)
    await PairsStage().run(cycle)
    return cycle


async def test_a_cycle_s_practice_becomes_a_row_for_each_family(store: Store) -> None:
    cycle = await practised(store)
    write_families(store, cycle.id)
    found = {family.name: family for family in families_of_cycle(store, cycle.id)}
    assert set(found) == {"price/text", "note/text"}
    # All samples look the mug up for "easy", three of five for "edge", where the critic prefers that, too.
    assert (found["price/text"].num_tasks, found["price/text"].solve_rate) == (2, pytest.approx((1.0 + 0.6) / 2))
    assert (found["note/text"].num_tasks, found["note/text"].solve_rate) == (1, 0.0)
    assert [found[name].num_pairs for name in ("price/text", "note/text")] == [1, 0]


async def test_rows_that_are_written_again_are_the_same(store: Store) -> None:
    cycle = await practised(store)
    write_families(store, cycle.id)
    before = [row.split('"seen_at"')[0] for row in dump(store, "families")]
    write_families(store, cycle.id)
    assert [row.split('"seen_at"')[0] for row in dump(store, "families")] == before


async def test_the_probe_s_estimate_counts_more_than_one_rollout_and_covers_what_it_dropped(store: Store) -> None:
    cycle = await practised(store)
    with store.transaction() as db:
        db.execute("UPDATE tasks SET solve_rate = 0.75, family = 'x/text' WHERE prompt IN ('easy', 'dropped')")
        db.execute("UPDATE tasks SET state = 'always_solved' WHERE prompt = 'dropped'")
    write_families(store, cycle.id)
    found = {family.name: family for family in families_of_cycle(store, cycle.id)}
    assert found["price/text"].solve_rate == pytest.approx((0.75 + 0.6) / 2), "rollouts say the tools, probes the rate"
    assert found["x/text"].num_tasks == 1


def test_later_cycles_weigh_more_and_few_tasks_say_little(store: Store) -> None:
    with_families(store, ("a", 100, 1.0), ("b", 1, 0.0))
    with_families(store, ("a", 100, 0.0))
    cycle = cycle_on(store)
    known = known_families(store, cycle.id, 5)
    assert known["a"].solve_rate == pytest.approx((100 * 0.0 + 50 * 1.0 + 1) / 152)
    assert known["b"].solve_rate == pytest.approx((0.5 * 1 * 0.0 + 1) / 2.5)
    assert (known["a"].num_tasks, known["a"].num_pairs) == (200, 2)
    assert known_families(store, cycle.id, 1).keys() == {"a"}, "only as many cycles as asked for"
    assert merged([Family("a", 10**6, 0.3, 0, 0.0)]).solve_rate == pytest.approx(0.3, abs=1e-4)


def test_half_solved_families_weigh_most_and_none_less_than_the_floor() -> None:
    weights = [weight_of(Family("a", 9, rate, 0, 0.0), 0.2) for rate in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert weights == pytest.approx([0.2, 0.8, 1.0, 0.8, 0.2])
    assert weight_of(None, 0.2) == 1.0


def test_draws_follow_the_weights_without_repeating_and_the_seed_decides() -> None:
    items, weights = list(range(10)), [1.0] * 5 + [0.25] * 5
    drawn = [draw(random.Random(seed), items, weights, 1) for seed in range(4000)]
    counts = Counter(one[0] for one in drawn)
    heavy, light = sum(counts[i] for i in range(5)), sum(counts[i] for i in range(5, 10))
    assert heavy / light == pytest.approx(4, rel=0.1)
    assert all(counts[i] for i in items)
    assert draw(random.Random(3), items, weights, 4) == draw(random.Random(3), items, weights, 4)
    assert sorted(draw(random.Random(3), items, weights, 10)) == items


async def shown_seeds(store: Store, *overrides: str) -> list[str]:
    """The first words of every example that the writer was shown, in a cycle with these settings."""
    cycle = cycle_on(
        store, "synthesize.num_tasks=60", "synthesize.min_tasks=1", "synthesize.num_examples=2", *overrides
    )
    await SeedsStage().run(cycle)
    sampler = FakeSampler(lambda prompt, sampling, index: write_task(WrittenTask(f"New task {sampling.seed}", None)))
    await SynthesizeStage(lambda cycle: sampler).run(cycle)
    rows = store.query(
        "SELECT s.response_id FROM task_seeds s JOIN tasks t ON t.id = s.task_id WHERE t.cycle_id = ? "
        "ORDER BY t.slot, s.response_id",
        (cycle.id,),
    )
    ended(cycle)
    return [row["response_id"] for row in rows]


async def test_the_next_cycle_is_written_from_seeds_at_the_edge_and_leaves_no_family_out(tmp_path: Path) -> None:
    shares, drawn = {}, {}
    for name, switch in (("off", "false"), ("on", "true"), ("again", "true")):
        store = open_home(tmp_path / name)
        for index in range(20):
            tool = "price" if index % 2 else "note"
            log_calls(store, f"{tool}_{index:02}", f"What of thing {index}?", tool)
        with_families(store, ("price/text", 200, 0.5), ("note/text", 200, 1.0))
        drawn[name] = await shown_seeds(store, f"synthesize.curriculum={switch}")
        shares[name] = sum("price" in response_id for response_id in drawn[name]) / len(drawn[name])
    assert 0.4 < shares["off"] < 0.6
    assert 0.7 < shares["on"] < 0.95
    assert drawn["on"] == drawn["again"] != drawn["off"]


async def test_without_the_curriculum_seeds_are_drawn_as_ever(store: Store) -> None:
    for index in range(12):
        log_request(store, f"{index:02}", f"What does a mug cost for customer {index}?")
    with_families(store, ("none/text", 200, 1.0))
    cycle = cycle_on(store)
    await SeedsStage().run(cycle)
    seeds = seed_records.seeds_of(store, cycle.id)
    assert curriculum.weights_for(cycle, seeds) == [weight_of(Family("", 0, 201 / 202, 0, 0.0), 0.2)] * 12
    ended(cycle)
    shown = await shown_seeds(store)
    rng = random.Random(derive_seed(cycle.seed, "examples", 0))
    assert shown[:2] == sorted(seed.response_id for seed in rng.sample(seeds, 2))
