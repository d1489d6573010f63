"""The loop on the real store, with stages made by hand: order, endings, resumption, cancellation, pause."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nightschool import UnavailableError
from nightschool_learner import records
from nightschool_learner.curriculum import families_of_cycle
from nightschool_learner.errors import NothingToLearnError, ServerGoneError
from nightschool_learner.loop import Learner
from nightschool_learner.sampling import patiently
from nightschool_learner.seed_records import KEPT, insert_task, new_task
from nightschool_learner.stages import STAGE_NAMES, Cycle, Ending
from nightschool_server.config.config import Config
from nightschool_server.config.learner import LearnerConfig
from nightschool_server.store.store import Store

from tests.learner.practice_app import app
from tests.learner.practice_home import open_home

Work = Callable[[Cycle], Awaitable[Ending | None]]
PROMOTED = Ending("promoted", "better by far")


async def nothing(cycle: Cycle) -> Ending | None:
    return None


async def promote(cycle: Cycle) -> Ending | None:
    return PROMOTED


@dataclass
class FakeStage:
    name: str
    work: Work
    num_runs: int = 0

    async def run(self, cycle: Cycle) -> Ending | None:
        self.num_runs += 1
        return await self.work(cycle)


@dataclass
class House:
    """A home, a learner on it, and stages that can be replaced."""

    store: Store
    stages: dict[str, FakeStage] = field(default_factory=lambda: {n: FakeStage(n, nothing) for n in STAGE_NAMES})

    def learner(self) -> Learner:
        config = Config(learner=LearnerConfig(poll_s=0.01, server_wait_s=1.0))
        return Learner(self.store.home, config, self.store, app, lambda _: tuple(self.stages.values()))

    async def run_until_ended(self, cycle_id: str) -> dict[str, object]:
        learner = self.learner()
        running = asyncio.create_task(learner.run())
        row = await self.wait(cycle_id, lambda row: row["ended_at"] is not None)
        learner.stopping.set()
        await running
        return row

    async def wait(self, cycle_id: str, reached: Callable[[dict[str, object]], bool]) -> dict[str, object]:
        while True:
            row = self.store.query("SELECT * FROM cycles WHERE id = ?", (cycle_id,))[0]
            if reached(row):
                return row
            await asyncio.sleep(0)

    def queue(self, *overrides: str) -> str:
        cycle_id = records.enqueue(self.store, "manual", "test")
        assert cycle_id is not None
        with self.store.transaction() as db:
            db.execute("UPDATE cycles SET overrides = ? WHERE id = ?", (json.dumps(overrides), cycle_id))
        return cycle_id

    def set_work(self, name: str, work: Work) -> None:
        self.stages[name].work = work

    @property
    def num_runs(self) -> list[int]:
        return [stage.num_runs for stage in self.stages.values()]


@pytest.fixture
def house(tmp_path: Path) -> House:
    store = open_home(tmp_path)
    store.home.server_file.write_text(json.dumps({"address": "127.0.0.1:1", "pid": 1, "version": "0"}))
    store.home.learner_token.write_text("token")
    made = House(store)
    made.set_work("promote", promote)
    return made


async def test_a_queued_cycle_runs_every_stage_in_order_and_leaves_its_files(house: House) -> None:
    seen: list[str] = []

    def note(name: str) -> Work:
        async def work(cycle: Cycle) -> Ending | None:
            seen.append(name)
            cycle.progress(name).begin(3, 3, {"things": 3})
            return PROMOTED if name == "promote" else None

        return work

    for name in STAGE_NAMES:
        house.set_work(name, note(name))
    cycle_id = house.queue("explore.num_candidates=3")
    row = await house.run_until_ended(cycle_id)
    assert seen == list(STAGE_NAMES)
    assert (row["state"], row["outcome"], row["incumbent"], row["num_resumes"]) == (
        "promoted",
        "better by far",
        "base",
        0,
    )
    folder = house.store.home.cycles / cycle_id
    assert json.loads((folder / "config.json").read_text())["explore"]["num_candidates"] == 3
    report = json.loads((folder / "report.json").read_text())
    assert [(stage["name"], stage["state"], stage["counts"]) for stage in report["stages"]] == [
        (name, "done", {"things": 3}) for name in STAGE_NAMES
    ]
    assert report["funnel"]["pairs"] == 0


async def test_what_is_known_of_families_is_written_before_a_cycle_ends_however_it_ends(house: House) -> None:
    async def probed(cycle: Cycle) -> Ending | None:
        with cycle.store.transaction() as db:
            insert_task(db, cycle.id, new_task(0, "Add 1 and 2", (), KEPT), [], [])
            db.execute("UPDATE tasks SET solve_rate = 0.5, family = 'add/text'")
        raise NothingToLearnError("enough")

    house.set_work("synthesize", probed)
    row = await house.run_until_ended(house.queue())
    assert row["state"] == "stopped"
    assert [(family.name, family.solve_rate) for family in families_of_cycle(house.store, str(row["id"]))] == [
        ("add/text", 0.5)
    ]
    report = json.loads((house.store.home.cycles / str(row["id"]) / "report.json").read_text())
    assert [family["name"] for family in report["task_families"]] == ["add/text"]


async def test_a_report_that_a_kill_prevented_is_written_by_the_next_learner(house: House) -> None:
    cycle_id = house.queue()
    await house.run_until_ended(cycle_id)
    path = house.store.home.cycles / cycle_id / "report.json"
    written = path.read_text()
    path.unlink()
    await house.run_until_ended(cycle_id)
    assert path.read_text() == written


async def test_nothing_to_learn_stops_the_cycle_with_the_reason(house: House) -> None:
    async def work(cycle: Cycle) -> Ending | None:
        raise NothingToLearnError("3 pairs, fewer than 24")

    house.set_work("pairs", work)
    row = await house.run_until_ended(house.queue())
    assert (row["state"], row["outcome"]) == ("stopped", "3 pairs, fewer than 24")
    assert house.num_runs == [1, 1, 1, 1, 1, 0, 0, 0]


async def test_a_stage_that_fails_fails_the_cycle_and_not_the_learner(house: House) -> None:
    async def work(cycle: Cycle) -> Ending | None:
        raise ZeroDivisionError("no reason")

    house.set_work("explore", work)
    first = house.queue()
    row = await house.run_until_ended(first)
    assert (row["state"], row["outcome"]) == ("failed", "ZeroDivisionError: no reason")
    assert records.stage_states(house.store, first)["explore"] == "failed"
    assert house.store.query("SELECT last_error FROM learner")[0]["last_error"] == "ZeroDivisionError: no reason"
    house.set_work("explore", nothing)
    assert (await house.run_until_ended(house.queue()))["state"] == "promoted"
    assert house.store.query("SELECT last_error FROM learner")[0]["last_error"] == ""


async def test_a_wrong_override_fails_the_cycle_with_the_nearest_key(house: House) -> None:
    row = await house.run_until_ended(house.queue("explore.num_candidate=3"))
    assert row["state"] == "failed"
    assert "learner.explore.num_candidates" in str(row["outcome"])


async def test_a_learner_that_stops_leaves_the_cycle_to_the_next_one(house: House) -> None:
    async def wait(cycle: Cycle) -> Ending | None:
        await cycle.cancelled.wait()
        cycle.check()
        return None

    house.set_work("explore", wait)
    cycle_id = house.queue("pairs.min_pairs=3")
    learner = house.learner()
    running = asyncio.create_task(learner.run())
    await house.wait(cycle_id, lambda row: house.stages["explore"].num_runs == 1)
    learner.stopping.set()
    await running
    before = house.store.query("SELECT * FROM cycles")[0]
    assert before["state"] == "running"

    async def look(cycle: Cycle) -> Ending | None:
        assert cycle.config.pairs.min_pairs == 3, "a resumed cycle keeps the configuration that it began with"
        return None

    house.set_work("explore", look)
    row = await house.run_until_ended(cycle_id)
    assert (row["state"], row["num_resumes"], row["seed"]) == ("promoted", 1, before["seed"])
    assert house.num_runs == [1, 1, 2, 1, 1, 1, 1, 1]


async def test_a_cancelled_cycle_ends_with_the_operators_reason(house: House) -> None:
    async def wait(cycle: Cycle) -> Ending | None:
        with house.store.transaction() as db:
            db.execute("UPDATE cycles SET cancel_reason = 'not now' WHERE id = ?", (cycle.id,))
        await cycle.cancelled.wait()
        cycle.check()
        return None

    house.set_work("train", wait)
    row = await house.run_until_ended(house.queue())
    assert (row["state"], row["outcome"]) == ("cancelled", "not now")
    assert house.num_runs[-2:] == [0, 0]


async def test_a_queued_cycle_that_is_cancelled_never_runs(house: House) -> None:
    cycle_id = house.queue()
    with house.store.transaction() as db:
        db.execute("UPDATE cycles SET cancel_reason = 'changed my mind' WHERE id = ?", (cycle_id,))
    row = await house.run_until_ended(cycle_id)
    assert row["state"] == "cancelled"
    assert house.num_runs == [0] * 8


async def test_a_paused_learner_starts_nothing_and_its_calls_wait(house: House) -> None:
    pause = "UPDATE learner SET paused = ?"
    called: list[str] = []

    async def call(cycle: Cycle) -> Ending | None:
        with house.store.transaction() as db:
            db.execute(pause, (1,))
        while cycle.resumed.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0)
        calling = asyncio.create_task(patiently(cycle, answer))
        await asyncio.sleep(0)
        assert called == []
        with house.store.transaction() as db:
            db.execute(pause, (0,))
        await calling
        return None

    async def answer() -> None:
        called.append("answered")

    house.set_work("explore", call)
    with house.store.transaction() as db:
        db.execute(pause, (1,))
    cycle_id = house.queue()
    learner = house.learner()
    running = asyncio.create_task(learner.run())
    for _ in range(20):
        await asyncio.sleep(0)
    assert house.num_runs == [0] * 8
    with house.store.transaction() as db:
        db.execute(pause, (0,))
    await house.wait(cycle_id, lambda row: row["state"] == "promoted")
    assert called == ["answered"]
    learner.stopping.set()
    await running


async def test_a_server_that_is_away_does_not_end_the_cycle(house: House) -> None:
    num_calls = 0

    async def call() -> str:
        nonlocal num_calls
        num_calls += 1
        if num_calls < 3:
            raise UnavailableError("draining")
        return "here again"

    async def work(cycle: Cycle) -> Ending | None:
        if house.stages["explore"].num_runs < 2:
            raise ServerGoneError("gone for good")
        assert await patiently(cycle, call) == "here again"
        return None

    house.set_work("explore", work)
    row = await house.run_until_ended(house.queue())
    assert (row["state"], row["num_resumes"]) == ("promoted", 0), "nothing was restarted"
    assert house.num_runs == [1, 1, 2, 1, 1, 1, 1, 1]


async def test_waiting_for_a_server_has_an_end(house: House) -> None:
    async def call() -> None:
        raise UnavailableError("no one there")

    async def work(cycle: Cycle) -> Ending | None:
        with pytest.raises(ServerGoneError, match="no one there"):
            await patiently(cycle, call)
        return None

    house.set_work("explore", work)
    assert (await house.run_until_ended(house.queue()))["state"] == "promoted"


async def test_a_cycle_that_another_living_learner_holds_is_left_alone(house: House) -> None:
    cycle_id = house.queue()
    with house.store.transaction() as db:
        db.execute(
            "UPDATE cycles SET lease_pid = ?, lease_until = ? WHERE id = ?", (os.getppid(), time.time() + 60, cycle_id)
        )
    learner = house.learner()
    running = asyncio.create_task(learner.run())
    for _ in range(20):
        await asyncio.sleep(0)
    assert house.num_runs == [0] * 8
    with house.store.transaction() as db:
        db.execute("UPDATE cycles SET lease_until = ? WHERE id = ?", (time.time() - 1, cycle_id))
    await house.wait(cycle_id, lambda row: row["state"] == "promoted")
    learner.stopping.set()
    await running


async def test_a_cycle_takes_the_seed_that_it_is_given_and_another_one_each_time_without(house: House) -> None:
    house.set_work("promote", promote)
    given = await house.run_until_ended(house.queue("seed=4711"))
    drawn = [await house.run_until_ended(house.queue()) for _ in range(2)]
    assert given["seed"] == 4711
    assert len({row["seed"] for row in drawn}) == 2


def test_an_idle_learner_has_imported_nothing_that_only_cycles_need() -> None:
    code = "import sys, nightschool_learner.main; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "nightschool_learner.explore", "nightschool_learner.readiness"} & set(modules)
