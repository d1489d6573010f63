"""The probe on the real store and real tool workers, with answers made by hand."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner import records, seed_records
from nightschool_learner.difficulty import drop_settled_and_hopeless
from nightschool_learner.prompts import WrittenTask, write_task
from nightschool_learner.seed_records import KEPT
from nightschool_learner.seeds import SeedsStage
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesize import SynthesizeStage
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import ToolResult
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError
from nightschool_server.store.store import Store

from tests.learner import scored_app
from tests.learner.practice_home import DiedError, FakeSampler, cycle_on, dump, log_request, open_home

MUG = write_call("price", {"item": "mug"})
TASKS = ("easy", "edge", "hard", "broken")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def with_tasks(store: Store, *prompts: str, overrides: tuple[str, ...] = ()) -> Cycle:
    cycle = cycle_on(store, "synthesize.probe.enabled=true", "synthesize.concurrency=1", *overrides)
    if not seed_records.tasks_of(store, cycle.id):
        with store.transaction() as db:
            for slot, prompt in enumerate(prompts):
                seed_records.insert_task(db, cycle.id, seed_records.new_task(slot, prompt, (), KEPT), [], [])
    return cycle


def answers() -> FakeSampler:
    """Looks the price of a mug up, then answers: easy tasks alike, hard ones never alike, broken ones not at all."""
    num_answers: Counter[str] = Counter()

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        task = next(message.text for message in prompt.messages if message.role == "user")
        if not any(isinstance(part, ToolResult) for message in prompt.messages for part in message.parts):
            return MUG if task != "broken" else "<tool_call>{"
        num_answers[task] += 1
        return {"easy": "12", "edge": "12." if num_answers[task] % 2 else "13"}.get(task, f"{num_answers[task]}?")

    return FakeSampler(answer)


def rows(store: Store) -> dict[str, dict[str, object]]:
    return {row["prompt"]: row for row in store.query("SELECT * FROM tasks ORDER BY slot")}


async def probe(cycle: Cycle, sampler: FakeSampler) -> dict[str, int]:
    await drop_settled_and_hopeless(cycle, sampler)
    cycle.progress("synthesize").flush()
    return records.stage_counts(cycle.store, cycle.id, "synthesize")


async def test_tasks_that_teach_nothing_are_dropped_with_the_estimate_in_their_row(store: Store) -> None:
    counts = await probe(with_tasks(store, *TASKS), answers())
    found = rows(store)
    assert [found[task]["state"] for task in TASKS] == ["always_solved", KEPT, "never_solved", "never_solved"]
    assert [found[task]["solve_rate"] for task in TASKS] == [1.0, 0.5, 0.0, 0.0]
    assert sorted(json.loads(str(found["edge"]["probe_answers"]))) == ["12", "12", "13", "13"]
    assert [found[task]["family"] for task in TASKS] == ["price/text"] * 3 + ["none/text"]
    assert {row["probed_by"] for row in found.values()} == {"agreement"}
    assert (counts["probed"], counts["dropped_always_solved"], counts["dropped_never_solved"]) == (4, 1, 2)
    assert counts["probe_tokens"] == sum(int(str(row["probe_tokens"])) for row in found.values()) > 0


async def test_every_sample_has_a_seed_of_its_own_and_the_incumbent_s_weights(store: Store) -> None:
    sampler = answers()
    await probe(with_tasks(store, "edge", overrides=("synthesize.probe.temperature=0.9",)), sampler)
    assert len({sampling.seed for _, sampling, _ in sampler.calls}) == len(sampler.calls) == 8
    assert {(sampling.temperature, sampling.n, adapter) for _, sampling, adapter in sampler.calls} == {(0.9, 1, "base")}


async def test_first_actions_alone_are_one_call_a_task_and_run_nothing(store: Store) -> None:
    texts = {"easy": [MUG] * 4, "edge": [MUG, MUG, "12", "<tool_call>{"], "hard": ["1", "2", "3", MUG]}

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        return texts[prompt.messages[-1].text][index]

    sampler = FakeSampler(answer)
    await probe(with_tasks(store, *texts, overrides=("synthesize.probe.attempt=action",)), sampler)
    assert [sampling.n for _, sampling, _ in sampler.calls] == [4, 4, 4]
    assert [row["state"] for row in rows(store).values()] == ["always_solved", KEPT, "never_solved"]


async def test_the_application_s_scorer_knows_better_than_agreement(store: Store) -> None:
    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        return "dunno" if prompt.messages[-1].text == "agreed and wrong" else "12"

    cycle = with_tasks(store, "agreed and wrong", "agreed and right")
    cycle = replace(cycle, app=scored_app.app, app_ref="tests.learner.scored_app:app")
    await probe(cycle, FakeSampler(answer))
    found = rows(store)
    assert [row["state"] for row in found.values()] == ["never_solved", "always_solved"]
    assert {row["probed_by"] for row in found.values()} == {"scorer"}


async def test_a_budget_ends_the_probing_and_what_is_left_stays(store: Store) -> None:
    cycle = with_tasks(store, "easy", "other", "third", overrides=("synthesize.probe.max_tokens=1",))
    counts = await probe(cycle, answers())
    assert [row["probed_by"] for row in rows(store).values()] == ["agreement", "", ""]
    assert [row["state"] for row in rows(store).values()] == ["always_solved", KEPT, KEPT]
    assert counts["probed"] == 1


async def test_a_task_that_does_not_fit_the_context_is_out_of_reach(store: Store) -> None:
    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        raise ContextOverflowError("messages", "too long")

    for attempt in ("episode", "action"):
        cycle = with_tasks(store, "long", overrides=(f"synthesize.probe.attempt={attempt}",))
        await probe(cycle, FakeSampler(answer))
        assert rows(store)["long"]["state"] == "never_solved"
        with store.transaction() as db:
            db.execute("UPDATE tasks SET state = 'kept', probed_by = ''")


async def test_an_external_tool_without_a_simulator_never_runs_and_solves_nothing(store: Store, ordered: Path) -> None:
    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        return "done" if len(prompt.messages) > 2 else write_call("order", {"item": "mug"})

    await probe(with_tasks(store, "Order a mug"), FakeSampler(answer))
    assert rows(store)["Order a mug"]["state"] == "never_solved"
    assert not await asyncio.to_thread(ordered.exists)


def writer_and_answers() -> FakeSampler:
    """Writes a task for every slot, and answers them."""
    answered, kinds = answers(), iter(TASKS)

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if prompt.messages[0].text == "Help.":
            return answered.answer(prompt, sampling, index)
        return write_task(WrittenTask(next(kinds), None))

    return FakeSampler(answer)


async def synthesize(store: Store, sampler: FakeSampler) -> Cycle:
    overrides = ("synthesize.num_tasks=4", "synthesize.min_tasks=1", "synthesize.min_words=1", "seeds.min_seeds=3")
    cycle = with_tasks(store, overrides=overrides)
    await SeedsStage().run(cycle)
    await SynthesizeStage(lambda cycle: sampler).run(cycle)
    cycle.progress("synthesize").flush()
    return cycle


@pytest.mark.parametrize("die_at", range(3, 30, 9))
async def test_a_stage_that_dies_goes_on_and_ends_as_if_it_had_not(tmp_path: Path, die_at: int) -> None:
    states = []
    for name, dies in (("whole", None), ("killed", die_at)):
        store = open_home(tmp_path / name)
        for index in range(3):
            log_request(store, str(index), f"What does thing {index} cost?")
        sampler = writer_and_answers()
        sampler.die_at = dies
        if dies is not None:
            with pytest.raises(DiedError):
                await synthesize(store, sampler)
            sampler.die_at = None
        cycle = await synthesize(store, sampler)
        counts = records.stage_counts(store, cycle.id, "synthesize")
        kept = {key: counts[key] for key in ("kept", "probed", "dropped_always_solved", "dropped_never_solved")}
        states.append(([row["state"] for row in rows(store).values()], kept))
        assert len(store.query("SELECT * FROM tasks")) == 4
    assert states[0] == states[1]
    assert states[0][1] == {"kept": 1, "probed": 4, "dropped_always_solved": 1, "dropped_never_solved": 2}


async def test_a_probe_that_is_run_again_asks_nothing(store: Store) -> None:
    await probe(with_tasks(store, *TASKS), answers())
    before, sampler = dump(store, "tasks"), answers()
    await probe(with_tasks(store, *TASKS), sampler)
    assert sampler.calls == []
    assert dump(store, "tasks") == before
