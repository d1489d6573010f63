"""Training on another host: a real server, a real trainer of `nightschool train`, killed and started again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from nightschool_learner import records
from nightschool_learner.bundle import pack, unpack
from nightschool_learner.elsewhere import lent_device
from nightschool_learner.errors import CycleCancelledError, ServerGoneError, StageFailedError
from nightschool_learner.manifest import RunFolder
from nightschool_learner.stages import Cycle
from nightschool_learner.train import TrainStage
from nightschool_server.service.placement_admin import run_file

from tests.learner.candidate_home import World, add_pairs, fresh, world
from tests.learner.training_data import MODEL, make_run, run_trainer
from tests.server.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")
# Niceness 0: the runs are waited for, whatever else the machine does.
REMOTE = ("train.learning_rate=0.002", "train.placement=remote", "train.checkpoint_steps=1", "train.nice=0")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest.fixture
def finished(served: World) -> Iterator[None]:
    """Ends the test's cycle, so that the next one can have its own."""
    yield
    row = records.open_cycle(served.store)
    if row is not None:
        records.finish(served.store, row.id, "cancelled", "end of the test")


@contextmanager
def other_host(served: World, work: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`nightschool train` with nothing of the server's but its address and a token."""
    address = json.loads(served.home.server_file.read_text())["address"]
    environment = {**os.environ, "NIGHTSCHOOL_TOKEN": served.home.cli_token.read_text().strip()}
    command = [sys.executable, "-m", "nightschool_learner.remote", "--address", address, "--model", str(MODEL)]
    with subprocess.Popen(
        [*command, "--work", str(work), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


async def handed_out(cycle: Cycle, running: asyncio.Task[object]) -> Path:
    """The archive of the run, once it is there."""
    archive = run_file(cycle.home.cycles, cycle.id)
    async with asyncio.timeout(300):
        while not archive.exists():
            assert not running.done(), running.exception()
            await asyncio.sleep(0.02)
    return archive


@pytest.mark.usefixtures("finished")
async def test_a_trainer_elsewhere_fetches_the_run_and_its_adapter_becomes_the_candidate(
    served: World, tmp_path: Path
) -> None:
    cycle = served.cycle(*REMOTE)
    add_pairs(cycle, 10)
    running = asyncio.create_task(TrainStage().run(cycle))
    archive = await handed_out(cycle, running)
    with other_host(served, tmp_path) as trainer:
        out, err = await asyncio.to_thread(trainer.communicate, timeout=300)
    assert trainer.returncode == 0, err
    assert await running is None
    name = records.candidate_of(served.store, cycle.id)
    assert name == out.strip()
    adapter = await served.client.admin.adapters.get(name)
    assert (adapter.state, adapter.parent, adapter.cycle_id) == ("candidate", "base", cycle.id)
    assert not archive.exists()
    assert "event=training phase=done" in err, "the last of the phases is said, however short the others are"
    assert await TrainStage().run(fresh(cycle)) is None


@pytest.mark.usefixtures("finished")
async def test_a_trainer_elsewhere_that_is_killed_goes_on_from_its_checkpoint(served: World, tmp_path: Path) -> None:
    cycle = served.cycle(*REMOTE, "train.epochs=10")
    add_pairs(cycle, 10, seed=2)
    running = asyncio.create_task(TrainStage().run(cycle))
    await handed_out(cycle, running)
    folder = RunFolder(tmp_path / cycle.id)
    with other_host(served, tmp_path, "--watch") as trainer:
        async with asyncio.timeout(300):
            while folder.read_progress().step < 3:
                assert trainer.poll() is None, trainer.stderr.read() if trainer.stderr else ""
                await asyncio.sleep(0.02)
        trainer.send_signal(signal.SIGKILL)
    with other_host(served, tmp_path) as trainer:
        _, err = await asyncio.to_thread(trainer.communicate, timeout=300)
    assert trainer.returncode == 0, err
    assert await running is None
    assert [row["step"] for row in folder.read_metrics()] == list(range(1, 21))


@pytest.mark.usefixtures("finished")
async def test_a_cycle_that_waits_for_a_trainer_can_be_cancelled_and_taken_up(served: World) -> None:
    cycle = served.cycle(*REMOTE)
    add_pairs(cycle, 4, seed=3)
    running = asyncio.create_task(TrainStage().run(cycle))
    archive = await handed_out(cycle, running)
    before = archive.stat().st_mtime_ns
    cycle.cancelled.set()
    with pytest.raises(CycleCancelledError):
        await running
    again = fresh(cycle)
    running = asyncio.create_task(TrainStage().run(again))
    assert (await handed_out(again, running)).stat().st_mtime_ns == before
    again.cancelled.set()
    with pytest.raises(CycleCancelledError):
        await running


async def test_without_a_run_that_waits_the_trainer_says_so(served: World, tmp_path: Path) -> None:
    with other_host(served, tmp_path) as trainer:
        _, err = await asyncio.to_thread(trainer.communicate, timeout=300)
    assert trainer.returncode == 1
    assert "none waits for a trainer" in err


@pytest.mark.usefixtures("finished")
async def test_an_engine_that_cannot_sleep_fails_the_stage_with_the_remedy(served: World) -> None:
    cycle = served.cycle("train.placement=sleep")
    add_pairs(cycle, 4, seed=4)
    with pytest.raises(StageFailedError, match=r"--engine vllm, or set learner\.train\.placement"):
        await TrainStage().run(cycle)


async def healthy(served: World, expected: bool) -> None:
    """Wait until the server says so of its engine."""
    async with asyncio.timeout(300):
        while True:
            if (await served.client.admin.status()).healthy == expected:
                return
            await asyncio.sleep(0.02)


async def test_the_engine_sleeps_while_its_device_is_lent_and_a_server_that_leaves_takes_it_back(
    tmp_path: Path,
) -> None:
    async def start() -> ScriptedEngine:
        return ScriptedEngine()

    async with world(tmp_path / "home", start) as sleepy:
        cycle = sleepy.cycle("train.placement=sleep")
        progress = cycle.progress("train")
        async with lent_device(cycle, progress) as device:
            await healthy(sleepy, False)
            device.check()
            with pytest.raises(StageFailedError, match="sleeps already"):
                async with lent_device(cycle, progress):
                    pass
            device.check()
        await healthy(sleepy, True)
        lent = asyncio.create_task(hold(cycle))
        await healthy(sleepy, False)
    with pytest.raises(ServerGoneError):
        await lent


async def hold(cycle: Cycle) -> None:
    """Keep the device for as long as it is lent."""
    async with lent_device(cycle, cycle.progress("train")) as device:
        async with asyncio.timeout(300):
            while True:
                device.check()
                await asyncio.sleep(0.02)


async def test_a_bundle_has_all_that_a_run_needs_and_no_path_of_its_machine(tmp_path: Path) -> None:
    here = tmp_path / "here"
    parent = tmp_path / "parent"
    first = make_run(parent, num_text=4, num_pictures=0, epochs=1)
    assert run_trainer(first).returncode == 0
    manifest = make_run(
        here, num_text=4, num_pictures=2, num_anchors=2, anchor_weight=0.3, epochs=1, parent=first.output / "adapter"
    )
    archive = tmp_path / "run.tar"
    pack(RunFolder(manifest.output), archive)
    for path in (here, parent):
        path.rename(path.with_name(f"gone-{path.name}"))
    folder = unpack(archive, tmp_path / "there", manifest.base_model)
    assert str(here) not in folder.manifest.read_text()
    done = run_trainer(folder.read_manifest())
    assert done.returncode == 0, done.stderr
    result = folder.read_result()
    assert result is not None
    assert (result.num_pairs, result.num_anchors, result.parent) == (6, 2, "0001-parent")


async def test_an_archive_that_is_no_run_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "run.tar"
    archive.write_bytes(b"not a tar")
    with pytest.raises(StageFailedError, match="no training run"):
        unpack(archive, tmp_path / "there", "model")
