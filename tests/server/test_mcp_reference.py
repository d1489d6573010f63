"""The protocol's public reference servers, unmodified, as `make mcp-servers` installs them: listed, called, refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nightschool_server.agent.toolbox import Toolbox, open_tools
from nightschool_server.app import App, McpServer
from nightschool_server.chat import ToolCall
from nightschool_server.image_check import check_image
from nightschool_server.tools.effects import Purpose
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolOutcome

from tests.harness import ROOT
from tests.server.leaks import no_leaks

INSTALLED = ROOT / ".mcp-servers"
PYTHON = INSTALLED / "venv" / "bin"
NODE = INSTALLED / "node" / "node_modules" / ".bin"

needs_python = pytest.mark.skipif(not PYTHON.exists(), reason="the reference servers are not there: make mcp-servers")
needs_node = pytest.mark.skipif(
    not NODE.exists(), reason="npm was not there for `make mcp-servers`, which installs these servers with it"
)


@pytest.fixture
def state(tmp_path: Path) -> ToolState:
    return ToolState.initial(App("reference", ""), tmp_path / "states")


@asynccontextmanager
async def opened(*command: object, purpose: Purpose = "live") -> AsyncIterator[Toolbox]:
    """The tools of one server, under their own names."""
    server = McpServer("reference", command=[str(word) for word in command], prefix="", start_timeout_s=120)
    async with open_tools(App("reference", "", mcp=[server]), "no:app", purpose=purpose) as tools:
        yield tools


async def call(tools: Toolbox, state: ToolState, name: str, **arguments: object) -> ToolOutcome:
    return await tools.run(ToolCall("call_0", name, json.dumps(arguments)), state)


@needs_python
async def test_the_time_server_converts_times_in_practice_too(state: ToolState) -> None:
    async with opened(PYTHON / "mcp-server-time", purpose="practice") as tools:
        assert {spec.name for spec in tools.tools} == {"get_current_time", "convert_time"}
        zones = {"source_timezone": "Asia/Tokyo", "target_timezone": "UTC"}
        done = await call(tools, state, "convert_time", time="09:30", **zones)
        assert done.failure == ""
        assert "T00:30:00+00:00" in json.loads(done.content)["target"]["datetime"]
        wrong = await call(tools, state, "convert_time", time="25:00", **zones)
        assert (wrong.is_error, wrong.content.startswith("error: ")) == (True, True)


@needs_python
async def test_the_git_server_reads_in_practice_and_writes_in_earnest_alone(state: ToolState, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    git = [str(shutil.which("git")), "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    folder.mkdir()
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "Begin here"]):
        subprocess.run([*git, *words], check=True)  # noqa: ASYNC221
    (folder / "new.txt").write_text("new\n")
    repository = {"repo_path": str(folder)}
    async with opened(PYTHON / "mcp-server-git", "--repository", folder, purpose="practice") as tools:
        assert "Begin here" in (await call(tools, state, "git_log", **repository)).content
        assert (await call(tools, state, "git_add", **repository, files=["new.txt"])).failure == "refused"
    async with opened(PYTHON / "mcp-server-git", "--repository", folder) as tools:
        assert (await call(tools, state, "git_add", **repository, files=["new.txt"])).failure == ""
        assert "new file:   new.txt" in (await call(tools, state, "git_status", **repository)).content


@needs_python
async def test_the_fetch_server_is_bound_to_the_network_and_refused_in_practice(state: ToolState) -> None:
    async with opened(PYTHON / "mcp-server-fetch", purpose="practice") as tools:
        assert [spec.name for spec in tools.tools] == ["fetch"]
        done = await call(tools, state, "fetch", url="http://127.0.0.1:9/")
        assert (done.failure, done.content) == (
            "refused",
            "error: tool 'fetch' has external effects and is not run in practice",
        )


@needs_node
async def test_the_filesystem_server_works_in_its_folder_and_nowhere_else(state: ToolState, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    async with opened(NODE / "mcp-server-filesystem", folder) as tools:
        assert (await call(tools, state, "write_file", path=str(folder / "a.txt"), content="hello")).failure == ""
        assert (folder / "a.txt").read_text() == "hello"
        assert (await call(tools, state, "read_text_file", path=str(folder / "a.txt"))).content == "hello"
        denied = await call(tools, state, "read_text_file", path="/etc/passwd")
        assert denied.content.startswith("error: Access denied - path outside allowed directories")
    async with opened(NODE / "mcp-server-filesystem", folder, purpose="practice") as tools:
        assert (await call(tools, state, "list_directory", path=str(folder))).content == "[FILE] a.txt"
        refused = await call(tools, state, "write_file", path=str(folder / "b.txt"), content="hello")
        assert (refused.failure, (folder / "b.txt").exists()) == ("refused", False)


@needs_node
async def test_the_everything_server_gives_text_structures_links_and_images(state: ToolState, tmp_path: Path) -> None:
    async with no_leaks(tmp_path), opened(NODE / "mcp-server-everything") as tools:
        assert (await call(tools, state, "echo", message="hello")).content == "Echo: hello"
        done = await call(tools, state, "get-tiny-image")
        [(sha256, data)] = done.images.items()
        assert hashlib.sha256(data).hexdigest() == sha256
        assert (check_image(data).media_type, check_image(data).width) == ("image/png", 20)
        assert done.content == "Here's the image you requested:\nThe image above is the MCP logo."
        weather = await call(tools, state, "get-structured-content", location="Chicago")
        assert json.loads(weather.content)["conditions"]
        links = await call(tools, state, "get-resource-links", count=2)
        assert links.content.count("[resource ") == 2
        wrong = await call(tools, state, "get-sum", a="one", b=2)
        assert (wrong.failure, wrong.content) == ("schema", "error: argument 'a': 'one' is not of type 'number'")
