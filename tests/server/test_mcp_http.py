"""Tools of MCP servers behind streamable HTTP: the SDK's own server, and one that ends and forgets its sessions."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nightschool_server.agent.toolbox import Toolbox, list_tools, open_tools
from nightschool_server.app import App, AppError, McpServer
from nightschool_server.chat import ToolCall
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolOutcome

from tests.server import mcp_probe
from tests.server.leaks import no_leaks

HEADERS = {"Authorization": "Bearer ${PROBE_TOKEN}"}
GONE = "error: the MCP server 'web' ended the session or cannot be reached"

SDK_SERVER = """
import asyncio, socket
import uvicorn
from mcp.server import MCPServer
from mcp_types import ToolAnnotations

server = MCPServer("sums")

@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def add(a: int, b: int) -> int:
    '''Add two numbers.'''
    return a + b

@server.tool()
async def hang() -> str:
    '''Never end.'''
    await asyncio.Event().wait()

listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
config = uvicorn.Config(server.streamable_http_app(), log_level="error")
asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))
"""


@contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server's process and its port, which it prints when it listens."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.fixture
def held_port() -> Iterator[int]:
    """A port for a server that is started again: bound here without listening, so that nobody else is given it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As the server's own has, which may then bind it.
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def probe(port: int = 0) -> list[str]:
    return ["-S", str(Path(mcp_probe.__file__)), "--http", str(port)]


@pytest.fixture
def state(tmp_path: Path) -> ToolState:
    return ToolState.initial(App("web", ""), tmp_path / "states")


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_TOKEN", "secret")


def app_of(port: int) -> App:
    return App("web", "", mcp=[McpServer("web", url=f"http://127.0.0.1:{port}/mcp", headers=HEADERS, timeout_s=60)])


async def call(tools: Toolbox, state: ToolState, name: str, **arguments: object) -> ToolOutcome:
    return await tools.run(ToolCall("call_0", f"web.{name}", json.dumps(arguments)), state)


@pytest.fixture(scope="module")
def sdk_port() -> Iterator[int]:
    with running("-c", SDK_SERVER) as (_, port):
        yield port


@pytest.fixture
async def sums(sdk_port: int) -> AsyncIterator[Toolbox]:
    server = McpServer("web", url=f"http://127.0.0.1:{sdk_port}/mcp", timeout_s=60)
    async with open_tools(App("web", "", mcp=[server]), "no:app") as tools:
        yield tools


async def test_the_sdks_own_server_is_called_over_http(sums: Toolbox, state: ToolState) -> None:
    assert [spec.name for spec in sums.tools] == ["web.add", "web.hang"]
    results = await asyncio.gather(*(call(sums, state, "add", a=number, b=1) for number in range(20)))
    assert [done.content for done in results] == [str(number + 1) for number in range(20)]
    done = await call(sums, state, "add", a="two", b=1)
    assert (done.failure, "'two' is not of type 'integer'" in done.content) == ("schema", True)


async def test_a_call_that_hangs_over_http_costs_itself_alone(sums: Toolbox, state: ToolState) -> None:
    hang = ToolCall("call_0", "web.hang", "{}")
    hanging = asyncio.create_task(sums.run(hang, state, max_s=0.5))
    cancelled = asyncio.create_task(call(sums, state, "hang"))
    assert (await call(sums, state, "add", a=1, b=1)).content == "2"
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    done = await hanging
    assert (done.failure, done.content) == ("timeout", "error: the tool did not end within 0.5 s and was cancelled")
    assert (await call(sums, state, "add", a=1, b=2)).content == "3"


async def test_a_server_that_comes_back_is_reached_again(state: ToolState, held_port: int) -> None:
    with running(*probe(held_port)) as (process, port):
        async with open_tools(app_of(port), "no:app") as tools:
            assert (await call(tools, state, "echo", text="here")).content == "here"
            process.kill()
            process.wait()
            done = await call(tools, state, "send", text="gone")
            assert (done.failure, done.content) == ("execution", GONE)
            assert (await call(tools, state, "echo", text="gone")).content.endswith("cannot be started again")
            with running(*probe(port)) as (again, _):
                while (done := await call(tools, state, "pid")).is_error:
                    assert "it is started anew in" in done.content
                assert done.content == str(again.pid)


async def test_a_server_that_has_forgotten_the_session_is_asked_for_another(state: ToolState, held_port: int) -> None:
    with running(*probe(held_port)) as (process, port):
        async with open_tools(app_of(port), "no:app") as tools:
            assert (await call(tools, state, "pid")).content == str(process.pid)
            process.kill()
            process.wait()
            with running(*probe(port)) as (again, _):
                assert (await call(tools, state, "send", text="once")).content == GONE
                assert (await call(tools, state, "send", text="twice")).content == "sent twice"
                again.kill()
                again.wait()
                with running(*probe(port)) as (third, _):
                    assert (await call(tools, state, "pid")).content == str(third.pid), "it may be made once more"


async def test_a_header_that_the_server_does_not_take_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(*probe()) as (_, port):
        async with no_leaks(tmp_path):
            assert len(await list_tools(app_of(port))) == len(mcp_probe.TOOLS)
        monkeypatch.setenv("PROBE_TOKEN", "wrong")
        with pytest.raises(AppError, match=r"MCP server 'web' \(.*\) did not start: http://.*/mcp: MCPError: "):
            await list_tools(app_of(port))
