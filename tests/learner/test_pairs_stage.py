"""From practised steps to the trainer's file, on the real store."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner.errors import NothingToLearnError
from nightschool_learner.explore import ExploreStage
from nightschool_learner.pair_export import export_rows
from nightschool_learner.pairs import PairsStage
from nightschool_learner.records import stage_counts
from nightschool_learner.seed_records import KEPT, insert_task, new_task
from nightschool_learner.stages import Cycle
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import template_tools
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.store import Store

from tests.learner.practice_app import app
from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, dump, open_home

PICTURE = "d" * 64
MUG = write_call("price", {"item": "mug"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
    if prompt.messages[-1].role == "tool":
        return "12" if sampling.n == 1 else ["12 coins", "?", "12", "12"][index]
    return MUG if sampling.n == 1 else [write_call("price", {"item": "x"}), "12", MUG, MUG][index]


async def explored(store: Store, *overrides: str) -> Cycle:
    cycle = cycle_on(store, *overrides)
    with store.transaction() as db:
        insert_task(db, cycle.id, new_task(0, "What is this mug?", (PICTURE,), KEPT), [], [])
    await ExploreStage(lambda cycle: FakeSampler(answer), lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    return cycle


async def test_pairs_are_rows_and_lines_that_trl_reads(store: Store) -> None:
    cycle = await explored(store, "pairs.min_pairs=1")
    await PairsStage().run(cycle)
    rows = [json.loads(line) for line in (cycle.folder / "pairs.jsonl").read_text().splitlines()]
    assert rows == export_rows(store, cycle.id, app.specs)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["kind"]) for row in rows] == [
        (MUG, write_call("price", {"item": "x"}), "ran_vs_failed"),
        (MUG, "12", "both_ran"),
        ("12 coins", "12", "both_ran"),
        ("12 coins", "?", "both_ran"),
    ]
    first, last = rows[0], rows[-1]
    assert first["prompt"] == [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this mug?"}]},
    ]
    assert last["prompt"][2:] == [
        {"role": "assistant", "content": MUG},
        {"role": "tool", "name": "price", "content": "12"},
    ]
    assert first["images"] == [PICTURE]
    assert first["tools"] == template_tools(app.specs)
    assert bytes(first["chosen_token_ids"]).decode() == MUG, "the token ids are those that were sampled"
    assert last["margin"] == 7.0


async def test_the_stage_may_run_again(store: Store) -> None:
    cycle = await explored(store, "pairs.min_pairs=1")
    await PairsStage().run(cycle)
    rows, text = dump(store, "pairs"), (cycle.folder / "pairs.jsonl").read_text()
    await PairsStage().run(cycle)
    assert (dump(store, "pairs"), (cycle.folder / "pairs.jsonl").read_text()) == (rows, text)


async def test_steps_without_a_choice_become_anchors_where_the_rollout_found_an_answer(store: Store) -> None:
    cycle = cycle_on(store, "pairs.min_pairs=1", "pairs.anchors_per_pair=9", "pairs.min_anchor_probability=0")
    with store.transaction() as db:
        for slot, prompt in enumerate(("What is this mug?", "Is the sea blue?", "Go on for ever.")):
            insert_task(db, cycle.id, new_task(slot, prompt, (), KEPT), [], [])

    def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
        asked = prompt.messages[1].text
        if "sea" in asked:
            return "yes"
        return MUG if "ever" in asked else answer(prompt, sampling, index)

    await ExploreStage(lambda cycle: FakeSampler(said), lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    await PairsStage().run(cycle)
    (row,) = [json.loads(line) for line in (cycle.folder / "anchors.jsonl").read_text().splitlines()]
    assert row["prompt"][1]["content"] == "Is the sea blue?"
    assert row["answer"] == [{"role": "assistant", "content": "yes"}]
    assert bytes(row["answer_token_ids"]).decode() == "yes"
    assert row["images"] == []
    assert row["tools"] == template_tools(app.specs)


BOOK = write_call("book", {"room": "suite"})


@pytest.mark.parametrize("trained_on", [False, True])
async def test_what_rests_on_a_simulated_observation_is_trained_on_only_where_that_is_configured(
    store: Store, *, trained_on: bool
) -> None:
    settings = ("pairs.min_pairs=1", "pairs.max_share_failed=1", "pairs.min_anchor_probability=0")
    cycle = cycle_on(store, *settings, *["pairs.train_on_simulated=true"] * trained_on)
    with store.transaction() as db:
        for slot, prompt in enumerate(("What is this mug?", "Book the suite.", "Book the suite at once.")):
            insert_task(db, cycle.id, new_task(slot, prompt, (), KEPT), [], [])

    def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
        asked, has_booked = prompt.messages[1].text, prompt.messages[-1].role == "tool"
        if "mug" in asked:
            return answer(prompt, sampling, index)
        if "at once" in asked:
            return "done" if has_booked else BOOK
        if not has_booked:
            return BOOK if index != 1 else "no"
        return "done" if index else "it is done"

    await ExploreStage(lambda cycle: FakeSampler(said), lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    await PairsStage().run(cycle)
    pairs = [json.loads(line) for line in (cycle.folder / "pairs.jsonl").read_text().splitlines()]
    anchors = [json.loads(line) for line in (cycle.folder / "anchors.jsonl").read_text().splitlines()]
    counts = stage_counts(store, cycle.id, "pairs")
    simulated = [(pair["prompt"][-1]["role"], pair["chosen"][0]["content"]) for pair in pairs if pair["simulated"]]
    if trained_on:
        assert simulated == [("user", BOOK), ("tool", "it is done")], "by its own execution, and by its history"
        assert [anchor["answer"][0]["content"] for anchor in anchors] == [BOOK, "done"]
        assert "dropped_simulated" not in counts
        assert "anchors_dropped_simulated" not in counts
    else:
        assert (simulated, anchors) == ([], [])
        assert (counts["dropped_simulated"], counts["anchors_dropped_simulated"]) == (2, 2)
    assert next(pair["chosen"][0]["content"] for pair in pairs if not pair["simulated"]) == MUG


async def test_too_few_pairs_end_the_cycle(store: Store) -> None:
    with pytest.raises(NothingToLearnError, match="4 preference pairs, fewer than"):
        await PairsStage().run(await explored(store))
