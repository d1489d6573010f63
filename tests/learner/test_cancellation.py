"""What a stage that is cancelled in the middle leaves behind: no file that a thread was making for it, no task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nightschool_learner import seed_records
from nightschool_learner.difficulty import drop_settled_and_hopeless
from nightschool_learner.errors import CycleCancelledError
from nightschool_learner.explore import ExploreStage
from nightschool_learner.sampling import until_resumed
from nightschool_learner.seed_records import KEPT
from nightschool_learner.stages import Cycle
from nightschool_server.chat import File
from nightschool_server.store.store import Store

from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, open_home

TOO_LONG_S = 0.3
"""Within that a stage ends that does not wait for its threads."""


class Held(Mapping[str, Any]):
    """The state in which a task begins; reading it can be held up, in the thread that makes a task's workspace."""

    def __init__(self) -> None:
        self.is_held = False
        self.go_on = threading.Event()
        self.begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __iter__(self) -> Iterator[str]:
        if self.is_held:
            self._loop.call_soon_threadsafe(self.begun.set)
            assert self.go_on.wait(60)
        return iter(())

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __len__(self) -> int:
        return 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


async def cancelled_as_a_task_begins(store: Store, run: Callable[[Cycle], Coroutine[Any, Any, object]]) -> Cycle:
    """A cycle with one task that brings a file, cancelled while the task's workspace is being made."""
    held = Held()
    cycle = cycle_on(store)
    cycle = replace(cycle, app=replace(cycle.app, initial_state=held))
    file = File("numbers.txt", "text/plain", 2, store.put_blob(b"1\n", "text/plain"))
    with store.transaction() as db:
        task = seed_records.new_task(0, "Add up numbers.txt", (), KEPT, (file,))
        seed_records.insert_task(db, cycle.id, task, [], [])
    held.is_held = True
    running = asyncio.create_task(run(cycle))
    await held.begun.wait()
    cycle.cancelled.set()
    ended, _ = await asyncio.wait({running}, timeout=TOO_LONG_S)
    held.go_on.set()
    with pytest.raises(CycleCancelledError):
        await running
    assert not ended, "it waits for what a thread still makes"
    return cycle


async def test_an_exploration_leaves_no_workspace_that_was_being_made(store: Store) -> None:
    stage = ExploreStage(lambda _: FakeSampler(lambda *_: "1"), lambda *_: nullcontext(FakeCritic()))
    cycle = await cancelled_as_a_task_begins(store, stage.run)
    assert list(cycle.folder.glob("workspaces/*")) == []


async def test_a_probe_leaves_no_workspace_that_was_being_made(store: Store) -> None:
    sampler = FakeSampler(lambda *_: "1")
    cycle = await cancelled_as_a_task_begins(store, lambda cycle: drop_settled_and_hopeless(cycle, sampler))
    assert list(cycle.folder.glob("probe-*")) == []


async def test_a_call_of_a_paused_learner_leaves_no_task(store: Store) -> None:
    cycle = cycle_on(store)
    cycle.resumed.clear()
    waiting = asyncio.create_task(until_resumed(cycle))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    for _ in range(3):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
