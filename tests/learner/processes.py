"""Real server and learner processes, killed with real signals; the moment is chosen by watching the rows."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nightschool_server.home import Home
from nightschool_server.store.store import Store

ROOT = Path(__file__).parents[2]
DEADLINE_S = 600.0
POLL_S = 0.002


@dataclass
class Process:
    """A child process and where it writes what it says."""

    child: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; nothing where it has gone before."""
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.child.terminate()
        return self.child.wait(timeout=DEADLINE_S)


def start(home: Home, *arguments: str) -> Process:
    """Start `python -m ARGUMENTS --home HOME`."""
    log = home.path / f"{arguments[0]}.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--home", str(home.path)],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    return Process(child, log)


@contextmanager
def serving(home: Home, *settings: str) -> Iterator[Process]:
    """A server of the shop on `home`, without a learner of its own, once it answers."""
    home.create()
    flags = [flag for setting in ("server.port=0", *settings) for flag in ("--set", setting)]
    server = start(
        home, "nightschool_server", "serve", "--model", "examples/shop/model",
        "--app", "examples.shop.app:app", "--no-learner", *flags,
    )  # fmt: skip
    try:
        until(home.server_file.exists, server)
        yield server
    finally:
        server.stop()


@contextmanager
def learner(home: Home) -> Iterator[Process]:
    """A learner on `home`; one that still runs at the end is killed."""
    process = start(home, "nightschool_learner", "--set", "agent.app=examples.shop.app:app")
    try:
        yield process
    finally:
        process.kill()


def watch(store: Store, process: Process, reached: Callable[[], bool]) -> None:
    """Return when `reached`, which is asked again after every commit of another connection."""
    own = sqlite3.connect(f"file:{store.home.database}?mode=ro", uri=True)
    version: object = None

    def changed_and_reached() -> bool:
        nonlocal version
        now = own.execute("PRAGMA data_version").fetchone()
        if now == version:
            return False
        version = now
        return reached()

    try:
        until(changed_and_reached, process)
    finally:
        own.close()


def until(reached: Callable[[], bool], process: Process) -> None:
    """Return when `reached`; raises AssertionError where the process ends before that."""
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        if process.child.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"it did not come to it:\n{process.log.read_text()[-4000:]}")
        time.sleep(POLL_S)
