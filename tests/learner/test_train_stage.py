"""The train stage against a real server: one candidate a cycle, whatever is killed on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio
from nightschool_learner import records
from nightschool_learner.errors import CycleCancelledError, StageFailedError
from nightschool_learner.manifest import RunFolder
from nightschool_learner.train import TrainStage, choose_probes

from tests.learner.candidate_home import World, add_pairs, fresh, world

pytestmark = pytest.mark.asyncio(loop_scope="module")
QUICK = ("train.learning_rate=0.002", "train.epochs=2", "train.nice=0")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest.fixture
def finished(served: World) -> AsyncIterator[None]:  # type: ignore[misc]
    """Ends the test's cycle, so that the next one can have its own."""
    yield  # type: ignore[misc]
    row = records.open_cycle(served.store)
    if row is not None:
        records.finish(served.store, row.id, "cancelled", "end of the test")


async def num_adapters(served: World) -> int:
    return len([adapter async for adapter in served.client.admin.adapters.list()])


async def trainer_pid(folder: RunFolder, running: asyncio.Task[object]) -> int:
    """The pid of the trainer once it takes steps."""
    async with asyncio.timeout(300):
        while folder.read_progress().step < 2:
            assert not running.done(), running.exception()
            await asyncio.sleep(0.02)
    return int(json.loads(folder.child.read_text())["pid"])


@pytest.mark.usefixtures("finished")
async def test_a_cycle_trains_and_registers_one_candidate(served: World) -> None:
    cycle = served.cycle(*QUICK)
    add_pairs(cycle, 10)
    assert await TrainStage().run(cycle) is None
    name = records.candidate_of(served.store, cycle.id)
    assert name is not None
    adapter = await served.client.admin.adapters.get(name)
    assert (adapter.state, adapter.parent, adapter.cycle_id, adapter.rank) == ("candidate", "base", cycle.id, 64)
    manifest = json.loads((served.home.adapters / name / "manifest.json").read_text())
    assert manifest["data"]["num_pairs"] == 10
    assert len(manifest["probe"]["prompts"]) == 4
    assert manifest["training"]["hyperparameters"]["learning_rate"] == 0.002
    row = served.progress(cycle, "train")
    assert row["num_done"] == row["num_total"] == 4
    assert json.loads(row["counts"])["pairs"] == 10
    assert (cycle.folder / "plots" / "training.png").read_bytes().startswith(b"\x89PNG")

    before = await num_adapters(served)
    assert await TrainStage().run(fresh(cycle)) is None
    with served.store.transaction() as db:
        db.execute("UPDATE cycles SET candidate = NULL WHERE id = ?", (cycle.id,))
    assert await TrainStage().run(fresh(cycle)) is None
    assert records.candidate_of(served.store, cycle.id) == name
    assert await num_adapters(served) == before


@pytest.mark.usefixtures("finished")
async def test_a_killed_trainer_is_started_again_and_the_stage_goes_on(served: World) -> None:
    cycle = served.cycle(*QUICK, "train.epochs=10", "train.checkpoint_steps=1")
    add_pairs(cycle, 10, seed=2)
    running = asyncio.create_task(TrainStage().run(cycle))
    folder = RunFolder(cycle.folder / "train")
    os.killpg(await trainer_pid(folder, running), signal.SIGKILL)
    assert await running is None
    assert records.candidate_of(served.store, cycle.id) is not None
    assert [row["step"] for row in folder.read_metrics()] == list(range(1, 21))


@pytest.mark.usefixtures("finished")
async def test_a_cancelled_cycle_ends_its_trainer_and_can_be_taken_up_again(served: World) -> None:
    cycle = served.cycle(*QUICK, "train.epochs=10", "train.checkpoint_steps=1")
    add_pairs(cycle, 10, seed=3)
    running = asyncio.create_task(TrainStage().run(cycle))
    pid = await trainer_pid(RunFolder(cycle.folder / "train"), running)
    cycle.cancelled.set()
    with pytest.raises(CycleCancelledError):
        await running
    assert not psutil.pid_exists(pid)
    assert records.candidate_of(served.store, cycle.id) is None
    assert await TrainStage().run(fresh(cycle)) is None
    assert records.candidate_of(served.store, cycle.id) is not None


@pytest.mark.usefixtures("finished")
async def test_a_trainer_that_cannot_go_on_fails_the_stage_with_its_last_words(served: World) -> None:
    cycle = served.cycle(*QUICK, "train.max_length=16")
    add_pairs(cycle, 4)
    with pytest.raises(StageFailedError, match=r"exit code 2 and no result: .*none of 4 pairs fits 16 tokens"):
        await TrainStage().run(cycle)


@pytest.mark.usefixtures("finished")
async def test_an_alarm_ends_the_cycle_where_configured(served: World) -> None:
    cycle = served.cycle(*QUICK, "train.on_alarm=reject", "train.max_length_ratio=0.5")
    add_pairs(cycle, 10, seed=4)
    before = await num_adapters(served)
    ending = await TrainStage().run(cycle)
    assert ending is not None
    assert ending.state == "rejected"
    assert "times as long (limit 0.5)" in ending.outcome
    assert await num_adapters(served) == before


@pytest.mark.usefixtures("finished")
async def test_probes_are_spread_over_text_only_pairs(served: World) -> None:
    cycle = served.cycle()
    add_pairs(cycle, 9)
    probes = choose_probes(served.store, cycle.id, cycle.app.specs, 3)
    assert len({probe.messages for probe in probes}) == 3
    assert all(probe.continuation.startswith("<tool_call>") for probe in probes)
    assert [(tool["name"], tool["strict"]) for tool in probes[0].tools] == [("calculator", False)]
    assert choose_probes(served.store, cycle.id, cycle.app.specs, 0) == ()
