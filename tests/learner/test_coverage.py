"""What several samples find that one does not, from rows made by real steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner import seed_records
from nightschool_learner.coverage import coverage_of
from nightschool_learner.errors import NothingToLearnError
from nightschool_learner.explore import ExploreStage
from nightschool_learner.seed_records import KEPT
from nightschool_learner.stages import Cycle
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.store import Store

from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, log_request, open_home

SAID = {
    "all agree": ["12", "12", "12", "12", "12"],
    "the critic takes the rarest": ["12", "12", "12", "12", "it is 12"],
    "facts take the commonest": ["12", "12", "12", "12", "<tool_call>{"],
    "all fail": ["<tool_call>{"] * 5,
    "nobody is sure": ["one", "two", "one", "two", "one"],
}
"""What the five samples of each task's only step say."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def with_tasks(store: Store, *overrides: str) -> Cycle:
    cycle = cycle_on(store, "explore.max_steps=1", *overrides)
    log_request(store, "seed", "What does one mug cost?")
    with store.transaction() as db:
        for slot, prompt in enumerate(SAID):
            seed_records.insert_task(db, cycle.id, seed_records.new_task(slot, prompt, (), KEPT), [], [])
    return cycle


def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
    texts = SAID[prompt.messages[1].text]
    return texts[0] if sampling.n == 1 else texts[index + 1]


async def explored(cycle: Cycle) -> None:
    await ExploreStage(lambda _: FakeSampler(said), lambda *_: nullcontext(FakeCritic())).run(cycle)
    cycle.progress("explore").flush()


async def test_coverage_tells_one_sample_from_several(store: Store) -> None:
    cycle = with_tasks(store)
    await explored(cycle)
    found = coverage_of(store, cycle.id)
    assert (found.num_steps, found.num_steps_with_choice, found.choice_share) == (5, 3, 0.6)
    assert found.mean_actions == (1 + 2 + 2 + 1 + 2) / 5
    assert found.num_judged == 4, "all but the step of which nobody was sure"
    assert found.pass_at_1 == pytest.approx((1 + 1 / 5 + 4 / 5 + 0) / 4)
    assert found.pass_at_n == 3 / 4, "where everything failed nothing was found"
    assert (found.num_decided, found.num_overruled) == (2, 1)
    assert found.mean_margin_nats == len("it is 12") - len("12")
    [row] = store.query("SELECT message FROM stages WHERE name = 'explore'")
    assert row["message"] == (
        "60.0% of 5 steps had a choice, 1.60 actions a step; pass@1 50.0%, pass@n 75.0% of 4 judged steps"
    )


def test_a_cycle_without_steps_has_no_coverage(store: Store) -> None:
    found = coverage_of(store, with_tasks(store).id)
    assert (found.num_steps, found.choice_share, found.pass_at_1, found.mean_margin_nats) == (0, 0.0, None, None)


async def test_an_action_that_practice_may_not_run_is_no_failure_of_the_model(store: Store) -> None:
    order = write_call("order", {"item": "mug"})
    cycle = with_tasks(store)

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        return order if prompt.messages[1].text == "all fail" else said(prompt, sampling, index)

    await ExploreStage(lambda _: FakeSampler(answer), lambda *_: nullcontext(FakeCritic())).run(cycle)
    assert coverage_of(store, cycle.id).num_judged == 3


async def test_a_cycle_below_the_floor_of_coverage_stops_before_training(store: Store) -> None:
    with pytest.raises(
        NothingToLearnError,
        match=r"60\.0% of 5 steps had two different actions, fewer than learner\.explore\.min_choice_share = 0\.7",
    ):
        await explored(with_tasks(store, "explore.min_choice_share=0.7"))


async def test_a_cycle_at_the_floor_of_coverage_goes_on(store: Store) -> None:
    await explored(with_tasks(store, "explore.min_choice_share=0.6"))
