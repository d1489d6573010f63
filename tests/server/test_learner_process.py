"""The learner as a real process of a server: started again when it dies, stopped on drain, gone with its server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from nightschool_server.home import Home
from nightschool_server.learner_process import LearnerProcess
from nightschool_server.store.store import Store

from tests.harness import ROOT

APP = {"NIGHTSCHOOL__AGENT__APP": "examples.shop.app:app"}
WAIT_S = 200.0

SERVER = """
import asyncio, sys
from pathlib import Path
from nightschool_server.learner_process import LearnerProcess

async def main():
    learner = LearnerProcess(Path(sys.argv[1]), {"NIGHTSCHOOL__AGENT__APP": "examples.shop.app:app"}, print)
    learner.start()
    while learner.pid is None:
        await asyncio.sleep(0)
    print(learner.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a database, as a server leaves it."""
    Store.open(Home(tmp_path / "home")).close()
    return tmp_path / "home"


async def test_a_learner_that_dies_is_started_again_and_a_stopped_one_is_gone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    reasons: asyncio.Queue[str] = asyncio.Queue()
    learner = LearnerProcess(home, APP, reasons.put_nowait)
    learner.start()
    async with asyncio.timeout(WAIT_S):
        first = await reported(home, 0)
        assert first == learner.pid
        os.kill(first, signal.SIGKILL)
        assert "exit code -9; it starts again in 1 s" in await reasons.get()
        second = await reported(home, first)
        assert second == learner.pid
        await learner.stop()
    assert learner.pid is None
    assert not psutil.pid_exists(second)


async def test_a_learner_that_cannot_start_as_configured_is_left_alone(home: Path) -> None:
    reasons: asyncio.Queue[str] = asyncio.Queue()
    learner = LearnerProcess(home, {}, reasons.put_nowait)
    learner.start()
    async with asyncio.timeout(WAIT_S):
        assert "cannot start as configured" in await reasons.get()
    assert learner.pid is None
    await learner.stop()


def test_a_learner_whose_server_was_killed_ends_itself(home: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(home)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with closing(server.stdout):
        learner = psutil.Process(int(server.stdout.readline()))
    server.kill()
    server.wait(WAIT_S)
    assert psutil.wait_procs([learner], timeout=WAIT_S)[1] == []


async def reported(home: Path, not_pid: int) -> int:
    """The pid of the learner that reports itself, another one than `not_pid`."""
    with closing(Store.open(Home(home), migrate=False)) as store:
        while True:
            pid = store.query("SELECT pid FROM learner")[0]["pid"]
            if pid not in (None, not_pid):
                return int(pid)
            # Another process writes the row: there is no event to wait for, so the loop gives way to its neighbours.
            await asyncio.to_thread(os.sched_yield)
