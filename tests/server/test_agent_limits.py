"""What the calls of a step are held to: side by side or in their order, their time, their memory, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from nightschool_server import chat
from nightschool_server.agent.episode import Episode, Event, Execution, Limits, Step, ToolFinished, ToolStarted
from nightschool_server.agent.executors import ClientExecutor, RoutingExecutor
from nightschool_server.agent.limits import call_limits, episode_limits
from nightschool_server.agent.loop import execute
from nightschool_server.agent.toolbox import Toolbox, open_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import load_app
from nightschool_server.chat import ToolCall, ToolResult, ToolSpec
from nightschool_server.config.serving import AgentConfig
from nightschool_server.tools.returned import ReturnLimits
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import CallLimits

from tests.server.leaks import make_fifo, no_leaks, read_pids

APP_REF = "tests.server.tools_app:app"
APP = load_app(APP_REF)
ADD = write_call("add", {"a": 1, "b": 2})
PUT = write_call("put", {"item": "mug"})
MIB = 2**20


@pytest.fixture
async def tools() -> AsyncIterator[Toolbox]:
    limits = CallLimits(max_memory_bytes=64 * MIB)
    async with open_tools(APP, APP_REF, num_workers=2, limits=limits) as opened:
        yield opened


@pytest.fixture
def state(tmp_path: Path) -> ToolState:
    return ToolState.initial(APP, tmp_path / "states")


def contents(execution: Execution) -> list[str]:
    parts = [part for message in execution.observations for part in message.parts]
    return [part.content for part in parts if isinstance(part, ToolResult)]


def told(events: list[Event]) -> list[str]:
    """Begin and end of every call, in order."""
    said = []
    for event in events:
        if isinstance(event, ToolStarted):
            said.append(f"+{event.call.name}{event.call.id[-1]}")
        elif isinstance(event, ToolFinished):
            said.append(f"-{event.call.name}{event.call.id[-1]}")
    return said


async def test_neighbours_that_change_nothing_run_side_by_side_and_their_results_keep_their_order(
    tools: Toolbox, state: ToolState, tmp_path: Path
) -> None:
    fifo, events = make_fifo(tmp_path), list[Event]()

    async def on_event(event: Event) -> None:
        events.append(event)

    # Neither ends without the other; in their order the first would wait until its deadline.
    meet = [write_call("meet", {"fifo": str(fifo), "speak": speak}) for speak in (False, True)]
    done = await execute("".join([PUT, *meet, ADD, PUT, PUT]), state, tools, on_event=on_event)
    assert contents(done) == ['["mug"]', "hello", "spoke", "3", '["mug","mug"]', '["mug","mug","mug"]']
    assert told(events) == [
        "+put0", "-put0", "+meet1", "+meet2", "+add3", "-meet1", "-meet2", "-add3", "+put4", "-put4", "+put5", "-put5",
    ]  # fmt: skip
    assert done.failure == ""


async def test_no_more_calls_than_configured_run_side_by_side(tools: Toolbox, state: ToolState, tmp_path: Path) -> None:
    events: list[Event] = []

    async def on_event(event: Event) -> None:
        events.append(event)

    done = await execute(ADD * 2, state, tools, limits=Limits(max_parallel_calls=1), on_event=on_event)
    assert told(events) == ["+add0", "-add0", "+add1", "-add1"]
    assert contents(done) == ["3", "3"]
    meet = write_call("meet", {"fifo": str(make_fifo(tmp_path)), "speak": True})
    alone = await execute(meet + ADD, state, tools, limits=Limits(max_parallel_calls=1, max_tool_s=1))
    assert contents(alone)[0] == "error: the tool did not end within 1 s and was killed"


async def test_what_one_of_several_calls_does_wrong_is_its_own_affair(tools: Toolbox, state: ToolState) -> None:
    wrong = write_call("fail_by_mistake", {}) + write_call("fly", {}) + write_call("crash", {"how": "segfault"})
    done = await execute(ADD + wrong + ADD, state, tools)
    assert [content[:10] for content in contents(done)] == ["3", "error: Key", "error: no ", "error: the", "3"]
    assert done.failure == "execution", "the first that failed"


@pytest.mark.parametrize("num_calls", [1, 2])
async def test_a_tool_that_breaks_its_declaration_leaves_no_file(
    tools: Toolbox, state: ToolState, num_calls: int
) -> None:
    done = await execute(write_call("litter", {}) * num_calls, state, tools)
    assert (contents(done), done.state) == (["done"] * num_calls, state)
    assert not list(state.root.rglob("litter"))


@pytest.mark.parametrize("where", ["side by side", "simulator", "client"])
async def test_cancelling_reaches_every_running_call_at_once_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def never(call: ToolCall) -> ToolResult:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        raise AssertionError

    async with no_leaks(tmp_path):
        root = tmp_path / "states"
        fifos = [tmp_path / "first", tmp_path / "second"]
        purpose = "practice" if where == "simulator" else "live"
        async with open_tools(APP, APP_REF, num_workers=2, purpose=purpose) as tools:
            client = ClientExecutor([ToolSpec("echo", "", '{"type": "object"}')], never)
            calls = {
                "side by side": "".join(write_call("hang", {"fifo": str(fifo)}) for fifo in fifos),
                "simulator": write_call("post", {"text": f"@{fifos[0]}"}),
                "client": PUT + write_call("echo", {}),
            }
            made = {"side by side": fifos, "simulator": fifos[:1], "client": []}[where]
            for fifo in made:
                make_fifo(tmp_path).rename(fifo)
            executor = RoutingExecutor(tools, client)
            running = asyncio.create_task(execute(calls[where], ToolState.initial(APP, root), executor))
            pids = [pid for fifo in made for pid in await read_pids(fifo)]
            if where == "client":
                await asked.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert not any(psutil.pid_exists(pid) for pid in pids)
            assert len(pids) == {"side by side": 4, "simulator": 1, "client": 0}[where]
            assert gone.is_set() == (where == "client")
            assert contents(await execute(ADD, ToolState.initial(APP, root), tools)) == ["3"]
        for fifo in made:
            fifo.unlink()
        root.rmdir()


async def test_the_tool_time_of_a_task_is_limited_whatever_its_steps(tools: Toolbox, state: ToolState) -> None:
    first = await execute(ADD + PUT, state, tools)
    assert first.tool_s > 0
    begun = Episode((chat.user("?"),), state, Limits(max_tool_s=first.tool_s + 0.2))
    episode = begun.after(Step(ADD + PUT, first))
    assert episode.limits_left.max_tool_s == pytest.approx(0.2)
    hang = write_call("meet", {"fifo": str(make_fifo(state.root)), "speak": True})
    second = await execute(hang + PUT, episode.state, tools, limits=episode.limits_left)
    assert contents(second) == [
        "error: the tool did not end within 0.2 s and was killed",
        "error: the tools of this task have used up their time: answer without them",
    ]
    assert second.failure == "execution"
    assert second.state.data == '{"basket":["mug"]}', "what came before stays"


async def test_a_client_gets_no_more_time_than_its_task_has_left(state: ToolState) -> None:
    async def never(call: ToolCall) -> ToolResult:
        await asyncio.Event().wait()
        raise AssertionError

    client = ClientExecutor([ToolSpec("echo", "", '{"type": "object"}')], never, timeout_s=600)
    done = await execute(write_call("echo", {}), state, client, limits=Limits(max_tool_s=0.01))
    assert contents(done) == ["error: the client did not answer within 0.01 s"]


async def test_a_call_that_takes_too_much_memory_fails_alone(tools: Toolbox, state: ToolState) -> None:
    sizes = [16, 200, 16]
    done = await execute("".join(write_call("grow", {"mebibytes": size}) for size in sizes), state, tools)
    assert contents(done) == [
        str(16 * MIB),
        "error: MemoryError: the tool needs more memory than a call may take",
        str(16 * MIB),
    ]


def test_every_setting_of_the_agent_loop_reaches_an_episode_or_a_call() -> None:
    config = AgentConfig(
        max_malformed_steps=5, max_calls=6, max_parallel_calls=7, max_tool_s=8, tool_timeout_s=9, max_output_chars=10,
        max_tool_memory_bytes=11, max_files=12, max_file_bytes=13,
    )  # fmt: skip
    assert episode_limits(config, max_steps=1, max_step_tokens=2, max_tokens=3, max_time_s=4) == Limits(
        max_steps=1, max_step_tokens=2, max_tokens=3, max_time_s=4, max_malformed_steps=5, max_calls=6,
        max_parallel_calls=7, max_tool_s=8,
    )  # fmt: skip
    assert call_limits(config) == CallLimits(
        timeout_s=9, max_output_chars=10, max_memory_bytes=11, returned=ReturnLimits(max_files=12, max_file_bytes=13)
    )
