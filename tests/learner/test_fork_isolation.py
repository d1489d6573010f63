"""Practice through real workers: a rejected candidate is seen by nobody, a picked one whole."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from nightschool_learner import practice_records, seed_records
from nightschool_learner.budget import Budget
from nightschool_learner.comparisons import Court
from nightschool_learner.explore import ExploreStage
from nightschool_learner.meter import Meter
from nightschool_learner.panels import open_panel
from nightschool_learner.practice import Practice, PracticeActor
from nightschool_learner.practice_records import RolloutRow
from nightschool_learner.seed_records import KEPT, TaskRow
from nightschool_learner.stages import Cycle
from nightschool_learner.writer import Writer
from nightschool_server.agent.episode import Episode
from nightschool_server.agent.formats import open_format
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import user
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.ids import new_id
from nightschool_server.tools.forking import remove_tree
from nightschool_server.tools.state import ToolState

from tests.learner.isolation_app import app
from tests.learner.practice_home import DiedError, FakeCritic, FakeSampler, cycle_on, open_home

SOURCE = "tests.learner.isolation_app:app"
DIES = frozenset({"ccc", "ggg"})


@pytest.fixture
def cycle(tmp_path: Path) -> Cycle:
    made = cycle_on(open_home(tmp_path / "home"), "explore.num_candidates=4")
    return replace(made, app=app, app_ref=SOURCE, tools=app.specs)


@pytest.fixture
def task(cycle: Cycle) -> TaskRow:
    with cycle.store.transaction() as db:
        seed_records.insert_task(db, cycle.id, seed_records.new_task(0, "Leave marks.", (), KEPT), [], [])
    [row] = seed_records.tasks_of(cycle.store, cycle.id)
    return row


def marks(name: str) -> str:
    return write_call("mark", {"name": name, "crash": name in DIES}) + write_call("look", {})


def two_rounds(prompt: Prompt, sampling: Sampling, index: int) -> str:
    """Four candidates leave marks, twice; one of them dies in the middle. Then a look, and an answer."""
    position = sum(message.role == "assistant" for message in prompt.messages)
    if position == 2:
        return write_call("look", {})
    if position == 3:
        return "done"
    first, *others = (["a", "bb", "ccc", "dddd"], ["e", "ff", "ggg", "hhhh"])[position]
    return marks(first if sampling.n == 1 else others[index])


def clean(*names: str, broken: str = "") -> dict[str, Any]:
    """What `look` finds behind these marks, in their order, and nothing else."""
    mask = os.umask(0)
    os.umask(mask)
    files = {"log.txt": f"{oct(0o666 & ~mask)} {''.join(f'{name};' for name in (*names, *[broken] * bool(broken)))}"}
    for name in (*names, *[broken] * bool(broken)):
        files |= {name: oct(0o777 & ~mask), f"{name}/secret": f"0o400 {name}", "latest": f"-> {name}"}
    return {
        "state": {"marks": list(names)} if names else {},
        "files": files,
        "in the workspace": True,
        "seen": [],
        "environment": "",
        "umask": mask,
        "niceness": os.nice(0),
        "files allowed": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "signal": True,
        "descriptor 77": False,
        "imported": [],
    }


async def test_marks_of_a_rejected_candidate_are_seen_by_no_sibling_and_not_by_the_continuation(
    cycle: Cycle, task: TaskRow
) -> None:
    await ExploreStage(lambda _: FakeSampler(two_rounds), lambda _, __: nullcontext(FakeCritic())).run(cycle)
    rows = cycle.store.query(
        "SELECT s.position AS step, c.observation, c.failure, s.picked = c.position AS picked FROM candidates c "
        "JOIN steps s ON s.id = c.step_id WHERE NOT c.final ORDER BY s.position, c.position"
    )
    seen = [(row["step"], json.loads(row["observation"].splitlines()[-1])) for row in rows]
    assert seen == [
        (0, clean("a")),
        (0, clean("bb")),
        (0, clean(broken="ccc")),
        (0, clean("dddd")),
        (1, clean("dddd", "e")),
        (1, clean("dddd", "ff")),
        (1, clean("dddd", broken="ggg")),
        (1, clean("dddd", "hhhh")),
        (2, clean("dddd", "hhhh")),
    ]
    assert [row["failure"] for row in rows] == ["", "", "execution", ""] * 2 + [""]
    assert [row["picked"] for row in rows] == [0, 0, 0, 1] * 2 + [1]
    assert not list(cycle.folder.glob("workspaces/*")), "dropped whole"
    left = [process for process in psutil.process_iter(["cmdline"]) if str(cycle.folder) in str(process.info)]
    assert not left, "no process either"


@asynccontextmanager
async def practising(cycle: Cycle, task: TaskRow, critic: FakeCritic) -> AsyncIterator[Callable[[], PracticeActor]]:
    """A rollout of the task with workers of its own: every actor takes it up where the rows say that it is."""
    async with (
        Writer(cycle.store) as writer,
        open_tools(app, SOURCE, purpose="practice") as tools,
        open_panel(cycle, FakeSampler(lambda *_: "")) as panel,
        open_format(cycle.agent) as action_format,
    ):
        explored = cycle.progress("explore")
        practice = Practice(
            cycle_seed=1,
            adapter="base",
            config=cycle.config.explore,
            store=cycle.store,
            writer=writer,
            sampler=FakeSampler(two_rounds),
            executor=tools,
            action_format=action_format,
            explored=explored,
            court=Court(cycle.store, writer, critic, panel, cycle.progress("critique")),
            budget=Budget(cycle.config.explore, explored, Meter(explored, cycle.resumed)),
        )
        rollout = RolloutRow(new_id("roll"), task.id, "running")
        await writer.write(lambda db: practice_records.start_rollout(db, cycle.id, rollout, "base"))
        yield lambda: PracticeActor(practice, task, rollout.id)


def content(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Modes, times and bytes of all that is in a folder."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        about = path.lstat()
        text = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (about.st_mode, about.st_mtime_ns, text)
    return found


async def test_a_step_that_breaks_off_leaves_the_state_before_it_and_one_that_ends_is_committed_whole(
    cycle: Cycle, task: TaskRow, tmp_path: Path
) -> None:
    critic = FakeCritic(die_at=2)
    async with practising(cycle, task, critic) as take_up:
        root = tmp_path / "states"
        empty = ToolState.initial(app, root)
        folder = empty.make_workspace()
        (folder / "brought").write_text("by the caller")
        begun = Episode((user("?"),), replace(empty, workspace=folder))
        before = content(folder)
        with pytest.raises(DiedError):
            await take_up().act(begun)
        assert content(folder) == before
        for left in root.iterdir():
            if left != folder:
                remove_tree(left)  # The rollout's caller removes the whole root.

        critic.die_at, actor = None, take_up()
        second = begun.after(await actor.act(begun))
        assert content(folder) == before, "the pick is another folder"
        first_fork = second.state.workspace
        assert sorted(root.iterdir()) == sorted([folder, first_fork]), "its siblings are gone"
        third = second.after(await actor.act(second))
        assert third.state.workspace != first_fork
        assert sorted(root.iterdir()) == sorted([folder, third.state.workspace]), "and so is what it went on from"
        assert third.state.workspace is not None
        assert (third.state.workspace / "log.txt").read_text() == "dddd;hhhh;"
        assert (third.state.workspace / "brought").read_text() == "by the caller"
        third.state.discard()
