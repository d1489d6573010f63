"""A fork of the tool state has all of the original and shares none of it."""

from __future__ import annotations

import os
from pathlib import Path

from nightschool_server.app import App
from nightschool_server.tools.state import ToolState

APP = App("state", "", initial_state={"basket": {"mug": 1}})


def with_files(root: Path) -> tuple[ToolState, Path]:
    empty = ToolState.initial(APP, root)
    folder = empty.make_workspace()
    return ToolState(empty.data, empty.root, folder), folder


def test_a_task_begins_with_the_state_of_the_application_and_no_folder(tmp_path: Path) -> None:
    state = ToolState.initial(APP, tmp_path / "states")
    assert state.data == '{"basket":{"mug":1}}'
    assert state.workspace is None
    assert state.fork() == state
    assert not list(state.root.iterdir())


def test_an_empty_workspace_is_not_copied(tmp_path: Path) -> None:
    state, folder = with_files(tmp_path)
    assert state.fork().workspace is None
    assert list(tmp_path.iterdir()) == [folder]


def test_files_are_copied_and_discarded_with_their_fork(tmp_path: Path) -> None:
    state, folder = with_files(tmp_path)
    (folder / "a").mkdir()
    (folder / "a" / "list").write_text("mug")
    fork = state.fork()
    assert fork.workspace is not None
    (fork.workspace / "a" / "list").write_text("vase")
    (fork.workspace / "new").touch()
    assert (folder / "a" / "list").read_text() == "mug"
    assert not (folder / "new").exists()
    fork.discard()
    fork.discard()
    assert list(tmp_path.iterdir()) == [folder]


def test_links_and_paths_in_the_state_lead_into_the_fork(tmp_path: Path) -> None:
    state, folder = with_files(tmp_path)
    (folder / "list").write_text("mug")
    (folder / "absolute").symlink_to(folder / "list")
    (folder / "relative").symlink_to("list")
    (folder / "outside").symlink_to("/etc")
    state = ToolState(f'{{"path":"{folder}/list"}}', state.root, folder)
    fork = state.fork()
    assert fork.workspace is not None
    for name in ("absolute", "relative"):
        assert (fork.workspace / name).resolve() == fork.workspace / "list"
    assert (fork.workspace / "outside").readlink() == Path("/etc")
    assert fork.data == f'{{"path":"{fork.workspace}/list"}}'


def test_what_is_not_a_file_is_left_out_of_a_fork(tmp_path: Path) -> None:
    state, folder = with_files(tmp_path)
    os.mkfifo(folder / "fifo")
    (folder / "list").touch()
    fork = state.fork()
    assert fork.workspace is not None
    assert [path.name for path in fork.workspace.iterdir()] == ["list"]
