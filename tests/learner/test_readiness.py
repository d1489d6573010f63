"""What would stop a cycle after hours is said before it begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner.errors import StageFailedError
from nightschool_learner.readiness import check_ready
from nightschool_server.config.learner import LearnerConfig
from nightschool_server.store.store import Store

from tests.learner.practice_app import app
from tests.learner.practice_home import cycle_on, open_home
from tests.learner.test_loop import House

KEY = "NIGHTSCHOOL_TEST_KEY"


def endpoint(role: str) -> list[str]:
    settings = ("kind=endpoint", "endpoint.base_url=http://e/v1", "endpoint.model=m", f"endpoint.key_env={KEY}")
    return [f"{role}.{setting}" for setting in settings]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_home(tmp_path / "home")
    yield opened
    opened.close()


@pytest.fixture
def unanswered(tmp_path: Path) -> Path:
    """Held-out tasks without answers, which a judge compares."""
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"id": "1", "family": "price", "prompt": "What does a lamp cost?"}) + "\n")
    return path


async def test_a_cycle_on_the_served_model_is_ready(store: Store) -> None:
    assert await check_ready(cycle_on(store)) is None


@pytest.mark.parametrize(("role", "name"), [("synthesize", "writer"), ("critic", "critic")])
async def test_an_endpoint_without_its_key_is_named_before_anything_is_paid(store: Store, role: str, name: str) -> None:
    with pytest.raises(StageFailedError, match=rf"{KEY} \(endpoint\.key_env of the {name}\) is not set"):
        await check_ready(cycle_on(store, *endpoint(role)))


async def test_an_endpoint_that_nobody_will_ask_needs_no_key(store: Store) -> None:
    unused = ('critic.kinds=["facts", "scorer"]', *endpoint("critic"), *endpoint("gate.judge"))
    assert await check_ready(cycle_on(store, *unused)) is None


async def test_a_judge_is_looked_at_where_the_held_out_tasks_have_no_answers(store: Store, unanswered: Path) -> None:
    judged = replace(cycle_on(store), app=replace(app, evaluation=unanswered))
    ending = await check_ready(judged)
    assert ending is not None
    assert (ending.state, "is the training critic" in ending.outcome) == ("stopped", True)
    role = {"kind": "endpoint", "endpoint": {"base_url": "http://e/v1", "model": "m", "key_env": KEY}}
    config = LearnerConfig.model_validate({"gate": {"judge": role}})
    with pytest.raises(StageFailedError, match="of the judge"):
        await check_ready(replace(judged, config=config))


async def test_the_loop_ends_such_a_cycle_before_its_first_stage(store: Store) -> None:
    store.home.server_file.write_text(json.dumps({"address": "127.0.0.1:1", "pid": 1, "version": "0"}))
    store.home.learner_token.write_text("token")
    house = House(store)
    cycle_id = house.queue(*endpoint("synthesize"))
    row = await house.run_until_ended(cycle_id)
    assert (row["state"], KEY in str(row["outcome"])) == ("failed", True)
    assert house.num_runs == [0] * len(house.stages)
