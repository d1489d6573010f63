"""The hot temperature follows how much the steps of earlier cycles differed, and no further than it may."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner.explore import ExploreStage
from nightschool_learner.heat import MAX_FACTOR, STEP, factor, hot_temperature
from nightschool_learner.seed_records import KEPT, insert_task, new_task
from nightschool_learner.stages import Cycle
from nightschool_server.config.learner import LearnerConfig
from nightschool_server.config.practice import ExploreConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.store import Store
from pydantic import ValidationError

from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, open_home

TARGET = ("explore.target_choice_share=0.4", "explore.max_steps=1")
NUM_TASKS = 60


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_home(tmp_path)
    yield opened
    opened.close()


async def night(store: Store, *overrides: str, differing: int, num_tasks: int = NUM_TASKS) -> FakeSampler:
    """A cycle in which the samples of `differing` tasks differ; ended, and its sampler."""
    cycle = cycle_on(store, *overrides)
    with store.transaction() as db:
        for slot in range(num_tasks):
            insert_task(db, cycle.id, new_task(slot, f"{cycle.id} task {slot}", (), KEPT), [], [])

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        is_differing = int(prompt.messages[-1].text.rpartition(" ")[2]) < differing
        return f"answer {index if sampling.n > 1 else 9}" if is_differing else "12"

    sampler = FakeSampler(answer)
    await ExploreStage(lambda _: sampler, lambda *_: nullcontext(FakeCritic())).run(cycle)
    cycle.progress("explore").flush()
    end(store, cycle)
    return sampler


def end(store: Store, cycle: Cycle) -> None:
    with store.transaction() as db:
        db.execute("UPDATE cycles SET state = 'rejected', ended_at = ? WHERE id = ?", (time.time(), cycle.id))


def hottest(sampler: FakeSampler) -> float:
    return max(sampling.temperature for _, sampling, _ in sampler.calls)


def test_a_share_near_the_target_changes_nothing_and_one_far_from_it_a_step() -> None:
    assert factor([0.4, 0.33, 0.49], 0.4) == 1
    assert factor([0.1], 0.4) == STEP
    assert factor([0.9], 0.4) == 1 / STEP
    assert factor([0.1, 0.9], 0.4) == pytest.approx(1)
    assert factor([0.1] * 9, 0.4) == MAX_FACTOR
    assert factor([0.9] * 9, 0.4) == 1 / MAX_FACTOR


async def test_a_cycle_samples_hotter_after_one_that_agreed_and_colder_after_one_that_did_not(store: Store) -> None:
    assert hottest(await night(store, *TARGET, differing=3)) == 1.2
    assert hottest(await night(store, *TARGET, differing=55)) == pytest.approx(1.2 * STEP)
    assert hottest(await night(store, *TARGET, differing=24)) == pytest.approx(1.2)
    message = store.query("SELECT message FROM stages WHERE name = 'explore' ORDER BY cycle_id DESC")[0]["message"]
    assert "sampled at a hot temperature of 1.2" in message


async def test_a_small_cycle_says_nothing_and_without_a_target_nothing_changes(store: Store) -> None:
    await night(store, *TARGET, differing=3, num_tasks=10)
    assert hottest(await night(store, *TARGET, differing=3)) == 1.2
    assert hottest(await night(store, "explore.max_steps=1", differing=3)) == 1.2


def test_no_temperature_is_hotter_than_a_configuration_may_name(store: Store) -> None:
    hot = LearnerConfig().explore.model_copy(update={"hot_temperature": 4.0, "target_choice_share": 0.4})
    assert hot_temperature(store, cycle_on(store).id, hot) == 4.0


def test_temperatures_of_every_sample_leave_nothing_to_change() -> None:
    with pytest.raises(ValidationError, match="set one"):
        ExploreConfig(num_candidates=2, temperatures=(0.5, 1.0), target_choice_share=0.4)
