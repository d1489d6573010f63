"""A critic that answers otherwise than in earlier cycles: said, and where asked for, the end of the cycle."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner.critic_drift import Count, compare, drifts_of
from nightschool_learner.critique import Context, Verdict
from nightschool_learner.explore import CritiqueStage, ExploreStage
from nightschool_learner.prompts import CandidateView
from nightschool_learner.replay import settings_of
from nightschool_learner.report.gather import build
from nightschool_learner.seed_records import KEPT, insert_task, new_task
from nightschool_learner.stages import Cycle
from nightschool_server.config.learner import LearnerConfig
from nightschool_server.store.store import Store

from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, open_home
from tests.learner.test_explore import price_then_answer

SETTINGS = ("critic.min_gold=20", "critic.max_position_bias=0.5")
TASKS = 12


class FirstIsBest(FakeCritic):
    """Prefers whatever it is shown first."""

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        return Verdict("first", 3.0, "A", 20)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_home(tmp_path / "home")
    yield opened
    opened.close()


async def night(store: Store, critic: FakeCritic, name: str, *overrides: str) -> Cycle:
    """A cycle as far as its critic's answers."""
    tasks = [f"What is {name} mug {i}?" for i in range(TASKS)]
    cycle = cycle_on(store, *SETTINGS, *overrides)
    with store.transaction() as db:
        for slot, prompt in enumerate(tasks):
            insert_task(db, cycle.id, new_task(slot, prompt, (), KEPT), [], [])
    await ExploreStage(lambda _: FakeSampler(price_then_answer), lambda *_: nullcontext(critic)).run(cycle)
    return cycle


def end(store: Store, cycle: Cycle) -> None:
    with store.transaction() as db:
        db.execute("UPDATE cycles SET state = 'rejected', ended_at = ? WHERE id = ?", (time.time(), cycle.id))


def test_a_share_drifts_when_neither_chance_nor_the_bound_explains_the_difference() -> None:
    earlier = {"first_won": Count(100, 200)}
    moved = compare({"first_won": Count(170, 200)}, earlier, max_drift=0.15, min_count=30)
    assert [(one.name, one.now, one.earlier) for one in moved] == [("first_won", 0.85, 0.5)]
    assert str(moved[0]) == "the candidate shown first won: 85% of 200, in earlier cycles 50% of 200"
    assert compare({"first_won": Count(170, 200)}, earlier, max_drift=0.4, min_count=30) == (), "within the bound"
    assert compare({"first_won": Count(14, 20)}, earlier, max_drift=0.15, min_count=20) == (), "chance explains it"
    assert compare({"first_won": Count(20, 20)}, earlier, max_drift=0.15, min_count=30) == (), "too few"


async def test_a_critic_that_came_to_prefer_a_position_is_told_of_and_the_cycle_goes_on(store: Store) -> None:
    first = await night(store, FakeCritic(), "red")
    assert drifts_of(store, first.id) == (), "there is nothing to hold the first cycle against"
    end(store, first)
    alike = await night(store, FakeCritic(), "green")
    assert await CritiqueStage().run(alike) is None
    assert drifts_of(store, alike.id) == ()
    end(store, alike)

    other = await night(store, FirstIsBest(), "blue")
    assert await CritiqueStage().run(other) is None
    assert [one.name for one in drifts_of(store, other.id)] == ["first_won"]
    told = store.query("SELECT message FROM stages WHERE cycle_id = ? AND name = 'critique'", (other.id,))[0]["message"]
    assert "the candidate shown first won: 100%" in told
    assert build(store, other.id).critic_drifts == tuple(map(str, drifts_of(store, other.id)))


async def test_a_cycle_stops_for_it_where_it_is_told_to(store: Store) -> None:
    end(store, await night(store, FakeCritic(), "red", "critic.on_drift=stop"))
    ending = await CritiqueStage().run(await night(store, FirstIsBest(), "blue", "critic.on_drift=stop"))
    assert ending is not None
    assert (ending.state, "on_drift" in ending.outcome) == ("stopped", True)


async def test_cycles_of_another_critic_say_nothing_of_this_one(store: Store) -> None:
    end(store, await night(store, FakeCritic(), "red", "critic.margin_nats=2.0"))
    assert drifts_of(store, (await night(store, FirstIsBest(), "blue")).id) == ()


def test_settings_that_an_earlier_version_did_not_know_have_their_defaults() -> None:
    config = json.loads(LearnerConfig().model_dump_json())
    older = {**config, "critic": {key: value for key, value in config["critic"].items() if key != "max_drift"}}
    assert settings_of(json.dumps(older)) == settings_of(json.dumps(config))
    assert settings_of(json.dumps({**config, "critic": {"of": "the future"}})) == '{"of":"the future"}'
