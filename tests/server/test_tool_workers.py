"""Tools run in real processes, and whatever they do there stays there."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from nightschool_server.app import AppError, load_app
from nightschool_server.errors import FailedPreconditionError
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.worker import ToolWorker
from nightschool_server.tools.workers import CallLimits, ToolWorkers, _Seat

from tests.server.leaks import make_fifo, no_leaks, read_pids

APP = "tests.server.tools_app:app"


@pytest.fixture
async def workers() -> AsyncIterator[ToolWorkers]:
    async with await ToolWorkers.start(APP, 1, limits=CallLimits(max_output_chars=1000)) as started:
        yield started


@pytest.fixture
def state(tmp_path: Path) -> ToolState:
    return ToolState.initial(load_app(APP), tmp_path / "states")


async def test_a_tool_runs_and_leaves_the_state_alone(workers: ToolWorkers, state: ToolState) -> None:
    outcome = await workers.run("add", {"a": 2, "b": 3}, state)
    assert (outcome.content, outcome.is_error, outcome.failure, outcome.state) == ("5", False, "", state)
    assert outcome.duration_s > 0


async def test_an_async_tool_runs(workers: ToolWorkers, state: ToolState) -> None:
    assert (await workers.run("add_later", {"a": 2, "b": 3}, state)).content == "5"


async def test_the_state_goes_from_call_to_call(workers: ToolWorkers, state: ToolState) -> None:
    first = await workers.run("put", {"item": "mug"}, state)
    second = await workers.run("put", {"item": "lamp"}, first.state)
    assert second.content == '["mug","lamp"]'
    assert state.data == '{"basket":[]}'
    assert second.state.workspace is not None
    assert sorted(path.name for path in second.state.workspace.iterdir()) == ["lamp", "mug"]


async def test_nothing_of_a_candidate_is_seen_by_its_sibling_or_by_the_continuation(
    workers: ToolWorkers, state: ToolState
) -> None:
    begun = (await workers.run("put", {"item": "mug"}, state)).state
    rejected = await workers.run("put", {"item": "vase"}, begun.fork())
    rejected = await workers.run("look", {}, rejected.state)
    picked = await workers.run("look", {}, begun.fork())
    rejected.state.discard()
    assert json.loads(picked.content) == {
        "state": {"basket": ["mug"]},
        "files": ["mug"],
        "seen": [],
        "environ": "",
        "home": True,
        "path": False,
    }
    after = await workers.run("look", {}, picked.state)
    assert after.content == picked.content


async def test_a_tool_that_fails_leaves_the_state_as_it_was(workers: ToolWorkers, state: ToolState) -> None:
    outcome = await workers.run("fail_after_writing", {}, state)
    assert (outcome.content, outcome.failure) == ("error: no such thing", "execution")
    assert outcome.state.data == state.data


@pytest.mark.parametrize(
    ("call", "failure", "content"),
    [
        (("fail_by_mistake", {}), "execution", "error: KeyError: 'key'"),
        (("keep_a_set", {}), "execution", "error: TypeError: ctx.state holds what is not a JSON value"),
        (("change_although_read_only", {}), "execution", "is declared read_only but changed ctx.state"),
        (("add", {"a": 1}), "schema", "error: missing a required argument: 'b'"),
        (("add", {"a": 1, "b": 2, "c": 3}), "schema", "error: got an unexpected keyword argument 'c'"),
        (("fly", {}), "unknown_tool", "error: no tool is called 'fly'; the tools are add, "),
        (("crash", {"how": "exit"}), "execution", "error: the tool's process ended with exit code 3"),
        (("crash", {"how": "sys.exit"}), "execution", "error: SystemExit: bye"),
        (("crash", {"how": "segfault"}), "execution", "error: the tool's process ended with signal SIGSEGV"),
        (("crash", {"how": "memory"}), "execution", "error: MemoryError"),
        (("crash", {"how": "worker"}), "execution", "error: the tool worker died"),
        (("crash", {"how": "close"}), "execution", "error: the tool's process ended with exit code 0"),
    ],
)
async def test_an_error_is_an_observation_and_the_next_call_works(
    workers: ToolWorkers, state: ToolState, call: tuple[str, dict[str, object]], failure: str, content: str
) -> None:
    outcome = await workers.run(*call, state)
    assert outcome.is_error
    assert outcome.failure == failure
    assert content in outcome.content
    assert (await workers.run("add", {"a": 1, "b": 1}, state)).content == "2"


async def test_a_tool_that_removes_its_workspace_hurts_no_later_call(workers: ToolWorkers, state: ToolState) -> None:
    removed = await workers.run("remove_workspace", {}, state)
    assert removed.state.workspace is None
    full = await workers.run("put", {"item": "mug"}, removed.state)
    removed = await workers.run("remove_workspace", {}, full.state)
    assert (removed.content, removed.state.workspace) == ("removed", None)
    assert json.loads((await workers.run("look", {}, removed.state.fork())).content)["files"] == []


async def test_long_output_is_cut_with_a_mark_and_stdout_goes_nowhere(
    workers: ToolWorkers, state: ToolState, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (await workers.run("shout", {"length": 1000}, state)).content == "x" * 1000
    cut = await workers.run("shout", {"length": 50_000_000}, state)
    assert cut.content == "x" * 1000 + "\n[truncated: 1000 of 50000000 characters]"
    assert capfd.readouterr().out == ""


async def test_text_that_utf_8_does_not_take_is_replaced(workers: ToolWorkers, state: ToolState) -> None:
    assert (await workers.run("half_a_character", {}, state)).content == "a?b"


async def test_a_deadline_kills_the_tool_and_all_that_it_started(
    workers: ToolWorkers, state: ToolState, tmp_path: Path
) -> None:
    fifo = make_fifo(tmp_path)
    call = asyncio.create_task(workers.run("hang", {"fifo": str(fifo)}, state, timeout_s=5))
    pids = await read_pids(fifo)
    assert all(psutil.pid_exists(pid) for pid in pids)
    outcome = await call
    assert (outcome.failure, outcome.content) == ("timeout", "error: the tool did not end within 5 s and was killed")
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert (await workers.run("add", {"a": 1, "b": 1}, state)).content == "2"


async def test_cancelling_kills_the_tool_before_it_returns(
    workers: ToolWorkers, state: ToolState, tmp_path: Path
) -> None:
    fifo = make_fifo(tmp_path)
    call = asyncio.create_task(workers.run("hang", {"fifo": str(fifo)}, state))
    pids = await read_pids(fifo)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert (await workers.run("add", {"a": 1, "b": 1}, state)).content == "2"


@pytest.mark.parametrize("name", ["leave_running", "leave_daemon"])
async def test_a_process_that_a_tool_leaves_ends_with_its_call(
    workers: ToolWorkers, state: ToolState, name: str
) -> None:
    outcome = await workers.run(name, {}, state)
    assert not psutil.pid_exists(int(outcome.content))


async def test_what_a_call_has_locked_is_free_for_the_next(tmp_path: Path) -> None:
    state = ToolState.initial(load_app(APP), tmp_path / "states")
    async with await ToolWorkers.start(APP, 2) as workers:
        for _ in range(30):
            assert (await workers.run("keep_locked", {"path": str(tmp_path / "file")}, state)).content == "locked"


@pytest.mark.parametrize("how", ["thread", "timer"])
async def test_nothing_of_a_tool_runs_after_its_call(
    workers: ToolWorkers, state: ToolState, tmp_path: Path, how: str
) -> None:
    ticks = tmp_path / "ticks"
    assert (await workers.run("leave_ticking", {"path": str(ticks), "how": how}, state)).content == "ticking"
    size = ticks.stat().st_size
    assert (await workers.run("add", {"a": 1, "b": 1}, state)).content == "2"
    assert ticks.stat().st_size == size


async def test_many_calls_at_a_time_and_a_close_in_their_midst_leave_nothing(tmp_path: Path) -> None:
    async with no_leaks(tmp_path):
        root = tmp_path / "states"
        workers = await ToolWorkers.start(APP, 3)
        state = ToolState.initial(load_app(APP), root)
        outcomes = await asyncio.gather(*(workers.run("add", {"a": n, "b": n}, state) for n in range(200)))
        assert [outcome.content for outcome in outcomes] == [str(2 * n) for n in range(200)]
        fifo = make_fifo(tmp_path)
        hanging = asyncio.create_task(workers.run("hang", {"fifo": str(fifo)}, state))
        pids = await read_pids(fifo)
        await workers.close()
        assert (await hanging).content == "error: the tool worker died"
        assert not any(psutil.pid_exists(pid) for pid in pids)
        with pytest.raises(FailedPreconditionError):
            await workers.run("add", {"a": 1, "b": 1}, state)
        fifo.unlink()
        root.rmdir()


async def test_a_folder_of_a_call_that_outlived_its_worker_does_not_stay(state: ToolState) -> None:
    seat = _Seat(ToolWorker(APP))
    kept, running = seat.workspace(state), seat.workspace(state)
    seat.settle(kept, state)
    await seat.stop()
    assert seat.settle(running, state) == state
    assert list(state.root.iterdir()) == []


async def test_cancelling_many_calls_leaves_nothing(tmp_path: Path) -> None:
    async with no_leaks(tmp_path):
        root = tmp_path / "states"
        async with await ToolWorkers.start(APP, 2) as workers:
            state = ToolState.initial(load_app(APP), root)
            for cancelled_after in range(30):
                calls = [asyncio.create_task(workers.run("put", {"item": "mug"}, state)) for _ in range(4)]
                for _ in range(cancelled_after):
                    await asyncio.sleep(0)
                for call in calls:
                    call.cancel()
                for done in await asyncio.gather(*calls, return_exceptions=True):
                    if not isinstance(done, BaseException):
                        done.state.discard()
            assert (await workers.run("add", {"a": 1, "b": 1}, state)).content == "2"
        root.rmdir()


async def test_an_application_that_does_not_import_is_told_and_leaves_no_process(tmp_path: Path) -> None:
    async with no_leaks(tmp_path):
        with pytest.raises(AppError, match=r"no module .*no_such_app"):
            await ToolWorkers.start("tests.server.no_such_app:app", 2)


async def test_workers_and_tools_end_when_their_server_is_killed(tmp_path: Path) -> None:
    fifo = make_fifo(tmp_path)
    program = f"""
import asyncio, pathlib
from nightschool_server.app import load_app
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolWorkers
async def main():
    workers = await ToolWorkers.start({APP!r}, 2)
    state = ToolState.initial(load_app({APP!r}), pathlib.Path({str(tmp_path)!r}))
    await workers.run("hang", {{"fifo": {str(fifo)!r}}}, state)
asyncio.run(main())
"""
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    pids = await read_pids(fifo)
    processes: list[psutil.Process] = []
    async with asyncio.timeout(60):
        # Two workers, their children, and what the tool started. The idle worker forks ahead of a call when it likes.
        while len(processes) < 2 + 2 + 1:
            processes = await asyncio.to_thread(psutil.Process(server.pid).children, recursive=True)
    assert len(processes) == 2 + 2 + 1
    assert set(pids) <= {process.pid for process in processes}
    server.kill()
    await server.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 60)
    assert not alive


def test_a_worker_imports_neither_torch_nor_jsonschema() -> None:
    code = "import sys, nightschool_server.tools.process; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "jsonschema", "asyncio", "pydantic", "grpc"} & set(modules)


def is_worker(process: psutil.Process) -> bool:
    """Of the children of this process, which other tests may have, too, some about to go."""
    with suppress(psutil.Error):
        return "nightschool_server.tools.process" in process.cmdline()
    return False


async def test_a_worker_shares_its_starters_session_so_that_niceness_counts(
    workers: ToolWorkers, state: ToolState
) -> None:
    await workers.run("add", {"a": 2, "b": 3}, state)
    (worker,) = [process for process in psutil.Process().children() if is_worker(process)]
    sessions = {os.getsid(worker.pid)}
    for child in worker.children():
        with suppress(ProcessLookupError):  # That of the call ends behind its reply.
            sessions.add(os.getsid(child.pid))
    assert sessions == {os.getsid(0)}
    assert os.getpgid(worker.pid) == worker.pid
