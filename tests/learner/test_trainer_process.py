"""A trainer's life as a process: killed, resumed, ended with its learner, never two at once."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from nightschool_learner.manifest import Manifest, RunFolder, write_whole
from nightschool_learner.trainer_process import end_stale_trainer, last_words, start_trainer

from tests.learner.training_data import make_run

DEADLINE_S = 300.0


async def until(is_so: Callable[[], bool], process: asyncio.subprocess.Process | None = None) -> None:
    """Wait for a fact on the disk; fails where the process ends before it is one."""
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():
            assert process is None or process.returncode is None, "the trainer ended early"
            await asyncio.sleep(0.02)


def is_gone(process: psutil.Process) -> bool:
    """Whether a process that is not our child has ended; init may take it away between any two looks."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def long_run(folder: Path) -> Manifest:
    """36 steps with a checkpoint every second one and a look every sixth."""
    wanted = {"epochs": 12, "batch_size": 4, "checkpoint_steps": 2, "validation_share": 0.25, "num_looks": 6}
    return make_run(folder, num_text=14, num_pictures=2, num_anchors=8, anchor_weight=0.1, **wanted)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run, never killed."""
    manifest = long_run(tmp_path_factory.mktemp("unbroken"))
    command = [sys.executable, "-m", "nightschool_learner.trainer", str(manifest.output / "manifest.json")]
    subprocess.run(command, check=True, timeout=DEADLINE_S, capture_output=True)
    return RunFolder(manifest.output)


async def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_the_same(unbroken: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(long_run(tmp_path).output)
    for step in (7, 19):
        child = await start_trainer(folder)
        await until(lambda s=step: folder.read_progress().step >= s, child.process)  # type: ignore[misc]
        os.killpg(child.pid, signal.SIGKILL)
        assert await child.wait() == -signal.SIGKILL
        assert folder.read_result() is None
    child = await start_trainer(folder)
    assert await child.wait() == 0, last_words(folder)
    result, expected = folder.read_result(), unbroken.read_result()
    assert result is not None
    assert expected is not None
    assert result.num_steps == expected.num_steps == 36
    rows, expected_rows = folder.read_metrics(), unbroken.read_metrics()
    assert [row["step"] for row in rows] == list(range(1, 37))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected_rows], abs=1e-6)
    assert result.num_held_back == 4
    assert [look.step for look in result.looks] == [0, 6, 12, 18, 24, 30, 36]
    assert (result.looks, result.kept_step) == (expected.looks, expected.kept_step)
    weights = "adapter/adapter_model.safetensors"
    assert (folder.path / weights).read_bytes() == (unbroken.path / weights).read_bytes()


async def test_a_child_can_be_held_and_stopping_ends_it_even_then(tmp_path: Path) -> None:
    folder = RunFolder(long_run(tmp_path).output)
    child = await start_trainer(folder)
    await until(folder.progress.exists, child.process)
    child.hold()
    await until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
    child.go_on()
    await until(lambda: psutil.Process(child.pid).status() != psutil.STATUS_STOPPED)
    child.hold()
    await child.stop()
    assert not psutil.pid_exists(child.pid)
    await child.stop()


async def test_a_trainer_is_niced_within_its_learners_session(tmp_path: Path) -> None:
    manifest = long_run(tmp_path).model_copy(update={"nice": os.nice(0) + 1})
    folder = RunFolder(manifest.output)
    write_whole(folder.manifest, manifest.model_dump_json())
    child = await start_trainer(folder)
    await until(folder.progress.exists, child.process)
    assert (os.getpgid(child.pid), os.getsid(child.pid)) == (child.pid, os.getsid(0))
    assert psutil.Process(child.pid).nice() == manifest.nice
    groups = [Path(f"/proc/{pid}/autogroup") for pid in (child.pid, os.getpid())]
    assert not groups[0].exists() or groups[0].read_text() == groups[1].read_text()
    await child.stop()


@pytest.mark.parametrize("is_held", [False, True], ids=["running", "held"])
async def test_a_trainer_ends_when_its_learner_is_killed(tmp_path: Path, is_held: bool) -> None:
    folder = RunFolder(long_run(tmp_path).output)
    learner = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from nightschool_learner.manifest import RunFolder\n"
        "from nightschool_learner.trainer_process import start_trainer\n"
        "async def main():\n"
        "    child = await start_trainer(RunFolder(Path(sys.argv[1])))\n"
        "    print(child.pid, flush=True)\n"
        "    await asyncio.to_thread(sys.stdin.readline)\n"
        "    child.hold()\n"
        "    await child.wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", learner, str(folder.path), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    child = psutil.Process(int(await parent.stdout.readline()))
    await until(lambda: folder.read_progress().phase == "training", parent)
    if is_held:
        parent.stdin.write(b"hold\n")
        await until(lambda: child.status() == psutil.STATUS_STOPPED, parent)
    parent.kill()
    await parent.wait()
    await until(lambda: is_gone(child))
    assert folder.read_result() is None


async def test_a_stale_trainer_is_ended_by_pid_and_start_time(tmp_path: Path) -> None:
    folder = RunFolder(long_run(tmp_path).output)
    child = await start_trainer(folder)
    await until(lambda: folder.read_progress().step >= 1, child.process)
    assert await asyncio.to_thread(end_stale_trainer, folder)
    assert await child.wait() != 0
    assert folder.read_result() is None
    assert not end_stale_trainer(folder)


async def test_a_process_that_only_has_the_pid_is_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not end_stale_trainer(folder)
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    started = psutil.Process(other.pid).create_time()
    for record in (
        {"pid": other.pid, "started": started},
        {"pid": other.pid, "started": started - 9},
        {"pid": 2**22 + 5, "started": 1.0},
    ):
        write_whole(folder.child, json.dumps(record))
        assert not end_stale_trainer(folder)
    folder.child.write_text("{")
    assert not end_stale_trainer(folder)
    assert other.returncode is None
    await other.communicate(b"\n")


async def test_two_trainers_never_write_one_folder(tmp_path: Path) -> None:
    folder = RunFolder(long_run(tmp_path).output)
    with folder.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        child = await start_trainer(folder)
        assert await child.wait() == 1
    assert "another trainer holds" in last_words(folder)
    assert not folder.metrics.exists()


def test_the_last_words_of_a_silent_trainer_say_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert last_words(folder) == "it wrote nothing"
    folder.log.write_text("one\ntwo\nthree\nfour\n")
    assert last_words(folder) == "two | three | four"
