"""Task writing: which answers of the writer become tasks, on the real store with answers made by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from nightschool_learner import records, seed_records
from nightschool_learner.contamination import held_out_of
from nightschool_learner.errors import EndpointError, NothingToLearnError
from nightschool_learner.prompts import WrittenTask, write_task
from nightschool_learner.screening import HeldOut, Pool, task_key
from nightschool_learner.seed_records import KEPT, Seed
from nightschool_learner.seeds import SeedsStage
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesis.drafts import Draft, Screen, belongings_of
from nightschool_learner.synthesize import SynthesizeStage
from nightschool_server.config.practice import SynthesizeConfig
from nightschool_server.config.screening import ScreenConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError
from nightschool_server.store.store import Store

from tests.learner.practice_home import DiedError, FakeSampler, cycle_on, dump, log_request, open_home

PICTURE = "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_home(tmp_path)
    for index in range(12):
        log_request(store, f"{index:02}", f"What does a mug cost for customer {index}?")
    return store


async def seeded(store: Store, *overrides: str) -> Cycle:
    cycle = cycle_on(store, "synthesize.num_tasks=6", "synthesize.min_tasks=1", "synthesize.concurrency=2", *overrides)
    await SeedsStage().run(cycle)
    return cycle


def written(prompt: str) -> str:
    return write_task(WrittenTask(prompt, None))


def writer(*texts: str) -> FakeSampler:
    """Answers with `texts` in turn, then with tasks that are all different."""
    sampler = FakeSampler(lambda prompt, sampling, index: "")

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        number = len(sampler.calls) - 1
        return texts[number] if number < len(texts) else written(f"Write invoice number {sampling.seed}")

    sampler.answer = answer
    return sampler


async def run(cycle: Cycle, sampler: FakeSampler) -> dict[str, int]:
    await SynthesizeStage(lambda cycle: sampler).run(cycle)
    cycle.progress("synthesize").flush()
    return records.stage_counts(cycle.store, cycle.id, "synthesize")


SCREEN_CASES = [
    ("Sell two lamps", None, KEPT),
    ("Lamp", None, "length"),
    ("word " * 300, None, "length"),
    ("Please say: what does one LAMP cost for Zoe", None, "held_out_text"),
    ("what is in the picture", 1, KEPT),
    ("what is in the picture", 2, "held_out_image"),
    ("what does a mug cost for me", None, "copy"),
    ("Paint the shop green!", None, "duplicate"),
    ("Paint the shop green!", 1, KEPT),
]


@pytest.mark.parametrize(("text", "image_of", "verdict"), SCREEN_CASES)
def test_a_written_task_is_kept_or_dropped_for_a_reason(text: str, image_of: int | None, verdict: str) -> None:
    examples = [
        Seed("r0", "What does a mug cost for me?", (), "traffic"),
        Seed("r1", "What is this?", (PICTURE,), "traffic"),
        Seed("r2", "What is that?", ("b" * 64,), "traffic"),
    ]
    held_out = HeldOut([task_key("What does one lamp cost for Zoe?"), task_key("x y z", ["b" * 64])])
    known = Pool(ScreenConfig(), (), lambda sha256: None)
    known.add(task_key("paint the shop green"))
    screen = Screen(SynthesizeConfig(max_chars=1000), held_out, known)
    draft = Draft(text, belongings_of(WrittenTask(text, image_of), examples))
    assert screen.look(draft, examples) == screen.admit(draft, examples) == verdict


def test_the_application_s_held_out_tasks_are_screened(store: Store) -> None:
    assert held_out_of(cycle_on(store)).match(task_key("what does one mug cost for zoe")) == "text"


async def test_every_slot_becomes_a_task_or_a_counted_drop(store: Store) -> None:
    cycle = await seeded(store, "synthesize.max_attempts=1", "synthesize.concurrency=1")
    copied = store.query("SELECT parts FROM messages WHERE role = 'user'")
    texts = ["rubbish", written("What does one mug cost for Zoe?"), written("no"), written("Sell two lamps")]
    counts = await run(cycle, writer(*texts, written("sell two lamps!")))
    assert len(copied) == 12
    tasks = seed_records.tasks_of(store, cycle.id)
    assert [task.state for task in tasks] == ["parse", "held_out_text", "length", KEPT, "duplicate", KEPT]
    assert counts["kept"] == 2
    assert Counter(key for key in counts if key.startswith("dropped_")) == Counter(
        ["dropped_parse", "dropped_held_out_text", "dropped_length", "dropped_duplicate"]
    )
    assert (cycle.progress("synthesize").num_done, cycle.progress("synthesize").num_total) == (6, 6)


async def test_a_dropped_answer_is_tried_again_with_another_seed_and_every_attempt_is_kept(store: Store) -> None:
    cycle = await seeded(store, "synthesize.num_tasks=1")
    sampler = writer("rubbish", written("x"))
    await run(cycle, sampler)
    assert len({sampling.seed for _, sampling, _ in sampler.calls}) == 3
    [row] = store.query("SELECT state, raw FROM tasks")
    assert row["state"] == KEPT
    assert [attempt["verdict"] for attempt in json.loads(row["raw"])] == ["parse", "length", KEPT]


async def test_a_task_names_the_seeds_that_the_writer_saw(store: Store) -> None:
    cycle = await seeded(store)
    sampler = writer()
    await run(cycle, sampler)
    links = store.query("SELECT task_id, COUNT(*) AS n FROM task_seeds GROUP BY task_id")
    assert [row["n"] for row in links] == [3] * 6
    shown = sampler.calls[0][0].messages[-1].text
    [first] = [task for task in seed_records.tasks_of(store, cycle.id) if task.slot == 0]
    seeds = {row["response_id"] for row in store.query("SELECT * FROM task_seeds WHERE task_id = ?", (first.id,))}
    assert all(seed.prompt in shown for seed in seed_records.seeds_of(store, cycle.id) if seed.response_id in seeds)


async def test_a_task_of_an_earlier_cycle_is_not_written_again(store: Store) -> None:
    first = await seeded(store, "synthesize.num_tasks=1")
    await run(first, writer(written("Sell two lamps")))
    records.finish(store, first.id, "stopped", "test")
    second = await seeded(store, "synthesize.num_tasks=1", "synthesize.max_attempts=1", "synthesize.min_tasks=1")
    with pytest.raises(NothingToLearnError):
        await run(second, writer(written("sell TWO lamps")))
    assert [task.state for task in seed_records.tasks_of(store, second.id)] == ["duplicate"]


async def test_too_few_tasks_end_the_cycle(store: Store) -> None:
    cycle = await seeded(store, "synthesize.max_attempts=1", "synthesize.min_tasks=3")
    with pytest.raises(NothingToLearnError, match=r"0 tasks kept of 6, fewer than learner\.synthesize\.min_tasks = 3"):
        await run(cycle, FakeSampler(lambda prompt, sampling, index: "rubbish"))


async def test_a_prompt_that_does_not_fit_drops_the_slot(store: Store) -> None:
    def refuse(prompt: Prompt, sampling: Sampling, index: int) -> str:
        raise ContextOverflowError("messages", "too long")

    cycle = await seeded(store)
    with pytest.raises(NothingToLearnError):
        await run(cycle, FakeSampler(refuse))
    assert {task.state for task in seed_records.tasks_of(store, cycle.id)} == {"overflow"}


async def test_a_writer_that_is_away_costs_the_attempt_and_not_the_slot(store: Store) -> None:
    cycle = await seeded(store, "synthesize.num_tasks=1")

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if len(sampler.calls) == 1:
            raise EndpointError("writer at http://localhost: HTTP 500")
        return written("Write invoice number one")

    sampler = FakeSampler(answer)
    counts = await run(cycle, sampler)
    assert (counts["dropped_unavailable"], counts["kept"]) == (1, 1)


@pytest.mark.parametrize("die_at", range(6))
async def test_a_killed_synthesis_resumes_with_the_slots_that_are_left(store: Store, die_at: int) -> None:
    cycle = await seeded(store)
    sampler = writer()
    sampler.die_at = die_at
    with pytest.raises(DiedError):
        await run(cycle, sampler)
    before = dump(store, "tasks")
    sampler.die_at = None
    await run(await seeded(store), sampler)
    assert set(before) <= set(dump(store, "tasks"))
    assert [task.slot for task in seed_records.tasks_of(store, cycle.id)] == list(range(6))
    assert len(sampler.calls) <= 6 + 1, "at most the call of the other worker was in flight"


async def test_the_same_cycle_seed_asks_the_same(store: Store, tmp_path: Path) -> None:
    cycle = await seeded(store)
    sampler, again = writer(), writer()
    await run(cycle, sampler)
    records.finish(store, cycle.id, "stopped", "test")
    await run(await seeded(store), again)
    asked = {(prompt.messages, sampling) for prompt, sampling, _ in sampler.calls}
    assert {(prompt.messages, sampling) for prompt, sampling, _ in again.calls} >= asked
