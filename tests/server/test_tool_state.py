"""A fork of the tool state has all of the original and shares none of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nightschool_server.app import App
from nightschool_server.tools.forking import copy_tree, remove_tree, share_blocks
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


def test_a_fork_keeps_modes_times_and_attributes(tmp_path: Path) -> None:
    state, folder = with_files(tmp_path)
    (folder / "a").mkdir()
    (folder / "a" / "run").write_text("#!")
    (folder / "a" / "gone").symlink_to("nowhere")
    os.link(folder / "a" / "run", folder / "hard")
    os.utime(folder / "a" / "gone", (10, 20), follow_symlinks=False)
    (folder / "a" / "run").chmod(0o750)
    for path, seconds in ((folder / "a" / "run", 30), (folder / "a", 40), (folder, 50)):
        os.utime(path, (seconds, seconds + 0.5))
    (folder / "a").chmod(0o555)
    copy = state.fork().workspace
    assert copy is not None
    for name in ("a/run", "a/gone", "a", "hard", "."):
        one, other = (folder / name).lstat(), (copy / name).lstat()
        assert (one.st_mode, one.st_mtime_ns) == (other.st_mode, other.st_mtime_ns), name
    assert (copy / "hard").stat().st_nlink == 1, "writing to it must not reach the other name"
    assert (copy / "a" / "gone").readlink() == Path("nowhere")


def test_folders_may_be_nested_deeper_than_the_stack_goes(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from nightschool_server.tools.state import ToolState; "
        "root = pathlib.Path(sys.argv[1]); folder = root / 'w'; deep = pathlib.Path(*['d'] * 150); "
        "(folder / deep).mkdir(parents=True); (folder / deep / 'list').write_text('mug'); "
        "sys.setrecursionlimit(100); state = ToolState('{}', root, folder); fork = state.fork(); "
        "print((fork.workspace / deep / 'list').read_text()); fork.discard(); state.discard()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout == "mug\n"
    assert not list(tmp_path.iterdir())


def test_where_blocks_cannot_be_shared_files_are_copied(tmp_path: Path) -> None:
    _, folder = with_files(tmp_path)
    (folder / "list").write_bytes(b"mug" * 1_000_000)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        copy = Path(elsewhere, "list")
        assert not share_blocks(str(folder / "list"), str(copy)), "no two file systems share blocks"
        assert copy.read_bytes() == b""
        copy_tree(folder, Path(elsewhere))
        assert copy.read_bytes() == (folder / "list").read_bytes()


def test_a_workspace_goes_also_where_a_tool_has_taken_away_the_right_to(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from nightschool_server.tools.forking import remove_tree; "
        "os.getuid() or os.setuid(65534); "  # Root may do all.
        "folder = pathlib.Path(sys.argv[1], 'w'); (folder / 'a' / 'b').mkdir(parents=True); "
        "(folder / 'a' / 'b' / 'list').touch(); (folder / 'a' / 'out').symlink_to(sys.argv[1]); "
        "[path.chmod(0) for path in (folder / 'a' / 'b', folder / 'a', folder)]; "
        "remove_tree(folder); remove_tree(folder); sys.exit(folder.exists())"
    )
    home = Path(tempfile.mkdtemp(prefix="anyone-"))
    try:
        home.chmod(0o777)
        subprocess.run([sys.executable, "-c", code, str(home)], check=True)
        assert home.is_dir()
    finally:
        shutil.rmtree(home)


def test_a_link_is_not_followed_when_a_workspace_is_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "nowhere")
    assert (tmp_path / "kept").is_dir()
