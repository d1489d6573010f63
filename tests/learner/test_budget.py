"""What a cycle's practice may take, and what becomes of it at the bound."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner import records, seed_records
from nightschool_learner.errors import NothingToLearnError
from nightschool_learner.explore import CritiqueStage, ExploreStage
from nightschool_learner.pairs import PairsStage
from nightschool_learner.seed_records import KEPT
from nightschool_learner.stages import Cycle
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.store import Store

from tests.learner.practice_home import DiedError, FakeCritic, FakeSampler, cycle_on, log_request, open_home

MUG, LAMP = (write_call("price", {"item": item}) for item in ("mug", "lamp"))
STEP_TOKENS = 4 * len(MUG) + len(LAMP)
"""Of a first step: four samples of one call and one of another."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def with_tasks(store: Store, *overrides: str, num_tasks: int = 3) -> Cycle:
    cycle = cycle_on(store, "explore.concurrency=1", "pairs.min_pairs=1", *overrides)
    if not seed_records.tasks_of(store, cycle.id):
        log_request(store, "seed", "What does one mug cost?")
        with store.transaction() as db:
            for slot in range(num_tasks):
                seed_records.insert_task(db, cycle.id, seed_records.new_task(slot, f"Mug {slot}?", (), KEPT), [], [])
    return cycle


def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
    if prompt.messages[-1].role == "tool":
        return "12" if sampling.n == 1 else "It is 12"
    return MUG if sampling.n == 1 or index else LAMP


async def explored(cycle: Cycle, sampler: FakeSampler | None = None, critic: FakeCritic | None = None) -> Cycle:
    stage = ExploreStage(lambda _: sampler or FakeSampler(said), lambda *_: nullcontext(critic or FakeCritic()))
    await stage.run(cycle)
    cycle.progress("explore").flush()
    return cycle


def outcomes(store: Store) -> list[str]:
    return [row["outcome"] for row in store.query("SELECT outcome FROM rollouts WHERE state = 'done' ORDER BY rowid")]


def message(store: Store) -> str:
    return str(store.query("SELECT message FROM stages WHERE name = 'explore'")[0]["message"])


@pytest.mark.parametrize(
    ("override", "ended", "num_steps"),
    [
        (f"explore.max_cycle_tokens={STEP_TOKENS}", ["budget"], 1),
        (f"explore.max_cycle_tokens={STEP_TOKENS + 1}", ["answered"], 2),
        ("explore.max_cycle_calls=2", ["budget"], 1),
        ("explore.max_cycle_calls=3", ["answered", "budget"], 3),
        ("explore.max_cycle_calls=100", ["answered"] * 3, 6),
    ],
)
async def test_at_the_bound_no_new_step_and_no_new_rollout_begins(
    store: Store, override: str, ended: list[str], num_steps: int
) -> None:
    cycle = await explored(with_tasks(store, override))
    assert outcomes(store) == ended
    assert len(store.query("SELECT id FROM steps")) == num_steps
    assert store.query("SELECT id FROM steps WHERE picked IS NULL") == [], "a step in flight ends"
    counts = records.stage_counts(store, cycle.id, "explore")
    assert counts.get("budget", 0) == ended.count("budget")
    if len(ended) < 3:
        assert counts["not_begun"] == 3 - len(ended)
        spent = override.replace("=", " = ")
        assert f"the budget learner.{spent} was spent: {ended.count('budget')} rollouts ended early" in message(store)
        assert f"{3 - len(ended)} of 3 tasks were not begun" in message(store)
    else:
        assert "budget" not in message(store)


async def test_a_budget_of_time_that_is_spent_lets_nothing_begin(store: Store) -> None:
    cycle = with_tasks(store, "explore.max_cycle_s=2")
    store.connection.execute("""UPDATE stages SET counts = '{"wall_ms": 2000}' WHERE name = 'explore'""")
    sampler = FakeSampler(said)
    with pytest.raises(NothingToLearnError, match=r"max_cycle_s = 2 was spent: 0 rollouts .* 3 of 3 tasks"):
        await explored(cycle, sampler)
    assert sampler.calls == []
    again = with_tasks(store, "explore.max_cycle_s=3600")
    await explored(again, sampler)
    assert outcomes(store) == ["answered"] * 3


async def test_what_there_is_at_the_bound_becomes_pairs(store: Store) -> None:
    cycle = await explored(with_tasks(store, f"explore.max_cycle_tokens={STEP_TOKENS}"))
    await CritiqueStage().run(cycle)
    await PairsStage().run(cycle)
    assert len(store.query("SELECT id FROM pairs")) == 1


async def test_a_budget_counts_what_was_taken_before_a_restart(store: Store) -> None:
    bound = f"explore.max_cycle_tokens={STEP_TOKENS}"
    with pytest.raises(DiedError):
        await explored(with_tasks(store, bound), critic=FakeCritic(die_at=0))
    assert store.query("SELECT picked FROM steps") == [{"picked": None}]
    sampler = FakeSampler(said)
    await explored(with_tasks(store, bound), sampler)
    assert sampler.calls == [], "the step that was paid for is decided, and nothing else is sampled"
    assert outcomes(store) == ["budget"]
    assert store.query("SELECT picked_by FROM steps") == [{"picked_by": "critic"}]
