"""Tools of MCP servers that are real processes, over their pipes: what a call becomes, and what no server can break."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from nightschool_server.agent.toolbox import Toolbox, list_tools, open_tools
from nightschool_server.app import App, AppError, McpServer, load_app, tool
from nightschool_server.chat import ToolCall
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import CallLimits, ToolOutcome

from tests.harness import ROOT
from tests.server import mcp_app, mcp_probe
from tests.server.leaks import no_leaks

PROBE = [sys.executable, "-S", str(Path(mcp_probe.__file__))]
NOWHERE = "no.app:is_imported"
"""Without Python tools no worker imports the application."""


def app_of(*servers: McpServer, **fields: Any) -> App:
    return App("probes", "", mcp=servers, **fields)


def probe(name: str = "probe", **fields: Any) -> McpServer:
    return McpServer(name, command=PROBE, **fields)


@pytest.fixture
async def tools() -> AsyncIterator[Toolbox]:
    async with open_tools(app_of(probe(prefix="")), NOWHERE, limits=CallLimits(max_output_chars=1000)) as opened:
        yield opened


@pytest.fixture
def state(tmp_path: Path) -> ToolState:
    return ToolState.initial(app_of(), tmp_path / "states")


async def call(tools: Toolbox, state: ToolState, name: str, **arguments: object) -> ToolOutcome:
    return await tools.run(ToolCall("call_0", name, json.dumps(arguments)), state)


async def call_in_vain(tools: Toolbox, state: ToolState, name: str, max_s: float = 1.0) -> ToolOutcome:
    """A call that hangs, held to a time of its own: what else the test asks for may take as long as a machine likes."""
    return await tools.run(ToolCall("call_0", name, "{}"), state, max_s=max_s)


async def call_text(tools: Toolbox, state: ToolState, name: str) -> str:
    return (await call(tools, state, name)).content


async def until_waiting(tools: Toolbox, state: ToolState, number: int = 1) -> None:
    """Return when so many calls of `wait` have reached the server."""
    while await call_text(tools, state, "waiting") != str(number):
        pass


async def test_tools_are_listed_over_pages_with_their_schemas_as_the_server_wrote_them(tools: Toolbox) -> None:
    assert [spec.name for spec in tools.tools] == list(mcp_probe.TOOLS)
    echo = tools.tools[0]
    assert (echo.description, echo.schema) == ("Does echo.", mcp_probe.TEXT)


async def test_names_carry_the_prefix_and_only_what_is_wanted_is_offered() -> None:
    one = probe("one", include=["echo", "pid"])
    two = probe("two", prefix="second", exclude=[name for name in mcp_probe.TOOLS if name != "send"])
    app = app_of(one, two, tool_order=["second.send", "ask_client", "one.pid"])
    assert [spec.name for spec in await list_tools(app)] == ["second.send", "one.pid", "one.echo"]


async def test_a_result_of_every_kind_is_text_to_read_and_images_to_see(tools: Toolbox, state: ToolState) -> None:
    done = await call(tools, state, "everything")
    assert not done.is_error
    assert done.images == {hashlib.sha256(mcp_probe.PNG).hexdigest(): mcp_probe.PNG}
    lines = done.content.splitlines()
    assert lines[1].startswith("[image, image/png, that cannot be shown: it (3 bytes beginning 000000) is not an image")
    del lines[1]
    assert lines == [
        "one",
        "[audio, audio/wav, 3 bytes: it cannot be played here]",
        "[resource log: file:///log.txt, text/plain]",
        "[resource memo://1]",
        "a memo",
        "[resource blob://1, application/zip, 3 bytes]",
        "two",
    ]


async def test_a_picture_with_a_broken_remark_is_seen_without_it(tools: Toolbox, state: ToolState) -> None:
    done = await call(tools, state, "slightly_broken")
    assert (done.content, list(done.images.values())) == ("1 image", [mcp_probe.PNG])


async def test_code_gets_values_where_a_server_says_them_as_values(tools: Toolbox, state: ToolState) -> None:
    said = [(name, (await call(tools, state, name)).is_json) for name in ("count", "structured", "pid")]
    assert said == [("count", True), ("structured", True), ("pid", False)]


@pytest.mark.parametrize(
    ("written", "failure", "content"),
    [
        (("echo", {"text": "héllo\n"}), "", "héllo\n"),
        (("structured", {}), "", '{"a":1,"b":2}'),
        (("fail", {"text": "no such thing"}), "execution", "error: no such thing"),
        (("refuse", {"text": "not like this"}), "schema", "error: not like this"),
        (("echo", {"text": 1}), "schema", "error: argument 'text': 1 is not of type 'string'"),
        (("echo", {"text": "a", "loud": True}), "schema", "error: Additional properties are not allowed"),
        (("fly", {}), "unknown_tool", "error: no tool is called 'fly'"),
    ],
)
async def test_a_call_and_what_goes_wrong_in_it_are_observations(
    tools: Toolbox, state: ToolState, written: tuple[str, dict[str, object]], failure: str, content: str
) -> None:
    done = await call(tools, state, written[0], **written[1])
    assert (done.failure, done.is_error, done.state) == (failure, bool(failure), state)
    assert done.content.startswith(content)


async def test_long_output_is_cut_with_a_mark(tools: Toolbox, state: ToolState) -> None:
    done = await call(tools, state, "long")
    assert done.content == "x" * 1000 + "\n[truncated: 1000 of 3000000 characters]"


async def test_annotations_say_what_practice_may_run_and_the_application_has_the_last_word(state: ToolState) -> None:
    app = app_of(probe(prefix="", effects={"release": "external"}), probe("mine", effects={"send": "workspace"}))
    async with open_tools(app, NOWHERE, purpose="practice") as tools:
        assert (await call(tools, state, "echo", text="a")).failure == ""
        refused = await call(tools, state, "send", text="a")
        assert (refused.failure, refused.content) == (
            "refused",
            "error: tool 'send' has external effects and is not run in practice",
        )
        assert (await call(tools, state, "look_up")).failure == "refused", "it reads, but from an open world"
        assert (await call(tools, state, "release")).failure == "refused"
        assert (await call(tools, state, "mine.send", text="a")).content == "sent a"


async def test_a_simulator_answers_in_practice_in_place_of_a_servers_external_tool(state: ToolState) -> None:
    async with open_tools(mcp_app.app, "tests.server.mcp_app:app", num_workers=1, purpose="practice") as tools:
        assert [spec.name for spec in tools.tools][:4] == ["probe.echo", "crash", "hang", "probe.everything"]
        done = await call(tools, state, "probe.send", text="hello")
        assert (done.content, done.simulated, done.failure) == ("would have sent hello", True, "")
        done = await call(tools, state, "probe.echo", text="hello")
        assert (done.content, done.simulated) == ("hello", False)


async def test_a_server_gets_the_environment_that_the_application_names_and_no_other(
    state: ToolState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_TOKEN", "secret")
    server = probe(prefix="", env={"TOKEN": "Bearer ${SHOP_TOKEN}"})
    async with open_tools(app_of(server), NOWHERE) as tools:
        assert (await call(tools, state, "environment", text="TOKEN")).content == "Bearer secret"
        assert (await call(tools, state, "environment", text="SHOP_TOKEN")).content == "done"
    monkeypatch.delenv("SHOP_TOKEN")
    with pytest.raises(AppError, match=r"MCP server 'probe' \(.*: the environment variable SHOP_TOKEN is not set"):
        await list_tools(app_of(server))


async def test_a_call_that_hangs_costs_itself_alone_and_the_server_is_told(tools: Toolbox, state: ToolState) -> None:
    pid = await call_text(tools, state, "pid")
    done = await call_in_vain(tools, state, "wait")
    assert (done.failure, done.content) == ("timeout", "error: the tool did not end within 1 s and was cancelled")
    while await call_text(tools, state, "cancelled") != "1":
        pass
    assert await call_text(tools, state, "pid") == pid, "it still answers, so it is the same process"


async def test_a_server_declares_how_long_its_calls_may_take(state: ToolState) -> None:
    async with open_tools(app_of(probe(prefix="", timeout_s=0.2)), NOWHERE) as tools:
        assert (await call(tools, state, "wait")).content.startswith("error: the tool did not end within 0.2 s")


async def test_a_server_that_answers_nothing_any_more_is_started_again(tools: Toolbox, state: ToolState) -> None:
    pid = await call_text(tools, state, "pid")
    assert (await call_in_vain(tools, state, "freeze")).failure == "timeout"
    while (answer := await call(tools, state, "pid")).is_error:
        assert "did not answer any more and was ended" in answer.content
    assert answer.content != pid
    assert not psutil.pid_exists(int(pid))


@pytest.mark.parametrize(("how", "ended"), [("die", "exit code 3"), ("kill", "signal SIGKILL")])
async def test_a_server_that_ends_costs_the_calls_in_flight_and_is_started_by_the_next(
    tools: Toolbox, state: ToolState, how: str, ended: str
) -> None:
    pid = await call_text(tools, state, "pid")
    waiting = asyncio.create_task(call(tools, state, "wait"))
    await until_waiting(tools, state)
    done = await asyncio.gather(call(tools, state, how), waiting)
    assert {(each.failure, each.content) for each in done} == {
        ("execution", f"error: the MCP server 'probe' ended ({ended})")
    }
    again = await asyncio.gather(*(call_text(tools, state, "pid") for _ in range(3)))
    assert len(set(again)) == 1, "those who come meanwhile share the start"
    assert again[0] != pid


async def test_who_changes_nothing_does_not_pay_for_the_call_that_ends_the_server(
    state: ToolState, tmp_path: Path
) -> None:
    async with open_tools(app_of(probe(prefix="", effects={"die": "read_only"})), NOWHERE) as tools:
        marks = [tmp_path / "one", tmp_path / "two"]
        beside = [asyncio.create_task(call(tools, state, "wait_once", text=str(mark))) for mark in marks]
        while not all(mark.exists() for mark in marks):
            await call(tools, state, "pid")
        guilty = await call(tools, state, "die")
        assert (guilty.failure, guilty.content) == ("execution", "error: the MCP server 'probe' ended (exit code 3)")
        assert [done.content for done in await asyncio.gather(*beside)] == ["this time it came through"] * 2
        assert (await call(tools, state, "echo", text="between")).content == "between"
        assert (await call(tools, state, "die")).is_error
        assert (await call(tools, state, "echo", text="behind it")).content == "behind it"


async def test_a_server_that_ends_time_and_again_is_left_alone_for_a_while(tools: Toolbox, state: ToolState) -> None:
    # Each pause is twice as long as the last one, so that at last one is longer than it takes to die.
    num_ended = 0
    while "ended (exit code 3)" in (done := await call(tools, state, "die")).content:
        num_ended += 1
    assert num_ended >= 2, "the first time it is started again at once"
    assert done.failure == "execution"
    assert re.search(r"ended again after its start; it is started anew in \d+\.\d s", done.content)


async def test_a_cancelled_call_returns_at_once_and_the_server_is_told(tools: Toolbox, state: ToolState) -> None:
    waiting = asyncio.create_task(call(tools, state, "wait"))
    await until_waiting(tools, state)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    while await call_text(tools, state, "cancelled") != "1":
        pass


async def test_calls_are_answered_in_any_order(tools: Toolbox, state: ToolState) -> None:
    waiting = [asyncio.create_task(call(tools, state, "wait")) for _ in range(20)]
    await until_waiting(tools, state, 20)
    assert (await call(tools, state, "echo", text="a")).content == "a"
    await call(tools, state, "release")
    assert [done.content for done in await asyncio.gather(*waiting)] == ["released"] * 20


async def test_what_a_server_says_beside_the_protocol_goes_to_the_log(
    tools: Toolbox, state: ToolState, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, "nightschool_server.mcp"):
        assert (await call(tools, state, "noisy")).content == "said"
        while "stderr='a line of stderr'" not in caplog.text or "event=tools_changed" not in caplog.text:
            assert (await call(tools, state, "echo", text="still there")).content == "still there"
    assert capfd.readouterr() == ("", "")


async def test_nothing_stays_behind_not_even_what_a_server_started(tmp_path: Path) -> None:
    async with no_leaks(tmp_path):
        root = tmp_path / "states"
        state = ToolState.initial(app_of(), root)
        async with open_tools(app_of(probe(prefix=""), probe("second")), NOWHERE) as tools:
            pids = [int(pid) for pid in (await call_text(tools, state, "spawn")).split()]
            frozen = asyncio.create_task(call(tools, state, "second.freeze"))
            await call(tools, state, "die")
            assert not any(psutil.pid_exists(pid) for pid in pids)
            pids = [int(pid) for pid in (await call_text(tools, state, "spawn")).split()]
        assert (await frozen).failure == "execution"
        assert not any(psutil.pid_exists(pid) for pid in pids)
        root.rmdir()


async def test_a_killed_owner_takes_its_servers_along(tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib, sys
from nightschool_server.agent.toolbox import open_tools
from tests.server.test_mcp import NOWHERE, app_of, call_text, probe
from nightschool_server.tools.state import ToolState

async def main():
    state = ToolState.initial(app_of(), pathlib.Path({str(tmp_path)!r}))
    async with open_tools(app_of(probe(prefix="")), NOWHERE) as tools:
        print(await call_text(tools, state, "spawn"), flush=True)
        await call_text(tools, state, "freeze")

asyncio.run(main())
"""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert owner.stdout is not None
    left = [psutil.Process(int(pid)) for pid in (await owner.stdout.readline()).split()]
    assert len(left) == 3
    owner.kill()
    await owner.wait()
    assert (await asyncio.to_thread(psutil.wait_procs, left, 60))[1] == []


async def test_the_application_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "mcp.md").read_text()
    server, application, *_ = re.findall(r"```python\n# \w+\.py\n(.*?)```", page, re.S)
    (tmp_path / "stock_server.py").write_text(server)
    (tmp_path / "shop_with_stock.py").write_text(application)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    app, state = load_app("shop_with_stock:app"), ToolState.initial(app_of(), tmp_path / "states")
    async with open_tools(app, "shop_with_stock:app", num_workers=1, purpose="practice") as tools:
        assert [spec.name for spec in tools.tools] == ["wholesale.stock", "wholesale.order"]
        found = await call(tools, state, "wholesale.stock", item="mug")
        assert (found.content, found.is_json) == ("12", True)
        assert (await call(tools, state, "wholesale.stock", item="moon")).is_error
        ordered = await call(tools, state, "wholesale.order", item="mug", quantity=2)
        assert (ordered.content, ordered.simulated) == ("ordered 2 of mug", True)


def test_the_pages_table_has_every_argument() -> None:
    table = (ROOT / "docs" / "mcp.md").read_text().partition("## `McpServer(name, ...)`")[2].partition("\n## ")[0]
    named = [each.name for each in dataclasses.fields(McpServer) if each.name not in ("name", "where")]
    assert [name for name in named if f"`{name}`" not in table] == []


@tool(effect="read_only")
def echo(text: str) -> str:
    """Give it back."""
    return text


def pretend(message: str) -> str:
    return message


def listing(name: str, schema: dict[str, Any]) -> McpServer:
    listed = json.dumps([{"name": "fine", "inputSchema": mcp_probe.NOTHING}, {"name": name, "inputSchema": schema}])
    return McpServer("odd", command=[*PROBE, "--tools", listed], prefix="")


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (
            app_of(probe("one", prefix="same"), probe("two", prefix="same")),
            r"two tools called 'same.echo', from MCP server 'one' \(.*test_mcp.py:\d+\) and from MCP server 'two' \(",
        ),
        (
            app_of(listing("pattern", {"type": "object", "patternProperties": {"a": {}}})),
            r"MCP server 'odd' \(.*test_mcp.py:\d+\): the schema of its tool 'pattern' is wrong: patternProperties",
        ),
        (
            app_of(listing("wrong", {"type": "object", "properties": {"a": {"type": "text"}}})),
            "the schema of its tool 'wrong' is wrong: .*'text' is not valid",
        ),
        (
            app_of(listing("broken", {"type": "object", "properties": 3})),
            r"MCP server 'odd' \(.*\) did not start: what it says breaks the protocol: ",
        ),
        (app_of(listing("1st", mcp_probe.NOTHING)), "its tool '1st' would be called '1st', which must match"),
        (
            app_of(probe(simulate={"echo": lambda text: text})),
            "is of no use: the tool is read_only",
        ),
        (app_of(probe(simulate={"send": pretend})), r"test_mcp.py:\d+: the simulator of tool 'send' of .* takes: text"),
        (app_of(probe(include=["ecko"])), "include names 'ecko', which it does not have; its tools are echo, "),
        (app_of(probe(effects={"ecko": "read_only"})), "effects names 'ecko', which it does not have"),
        (app_of(McpServer("gone", command=["/no/such/program"])), "it ended .cannot be started: .*No such file"),
        (
            app_of(McpServer("rude", command=[sys.executable, "-c", "import sys; sys.exit('I will not')"])),
            r"MCP server 'rude' \(.*\) did not start: it ended \(exit code 1\)\n  I will not",
        ),
        (
            app_of(McpServer("mute", command=["sleep", "100"], start_timeout_s=0.2)),
            r"MCP server 'mute' \(.*\) did not answer within 0.2 s \(start_timeout_s\)",
        ),
        (app_of(McpServer("off", url="http://127.0.0.1:9/mcp")), r"MCP server 'off' .* http://127.0.0.1:9/mcp"),
    ],
)
async def test_what_is_wrong_with_a_server_stops_the_start(tmp_path: Path, app: App, message: str) -> None:
    async with no_leaks(tmp_path):
        with pytest.raises(AppError, match=message):
            await list_tools(app)


async def test_a_clash_between_a_function_and_a_server_names_both_places() -> None:
    app = app_of(probe(prefix=""), tools=[echo])
    message = r"'echo', from .*test_mcp.py:\d+ and from MCP server 'probe' \(.*test_mcp.py:\d+\): rename one"
    with pytest.raises(AppError, match=message):
        async with open_tools(app, "tests.server.tools_app:app"):
            pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"command": ["a"], "url": "http://b"}, "either a command or a url"),
        ({}, "either a command or a url"),
        ({"command": "npx server"}, r"command is text: write a list, e.g. \['npx', 'server'\]"),
        ({"url": "b:80"}, "must begin with http"),
        ({"url": "http://b", "env": {"A": "b"}}, "env and cwd are of a child process"),
        ({"command": ["a"], "headers": {"A": "b"}}, "headers are of a url"),
        ({"command": ["a"], "prefix": "a b"}, "prefix is 'a b'"),
        ({"command": ["a"], "effects": {"x": "harmless"}}, "effects.'x'. is 'harmless'"),
        ({"command": ["a"], "timeout_s": 0}, "timeout_s is 0; it must be above 0"),
    ],
)
def test_a_wrong_declaration_names_its_place(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=rf"MCP server 'x' \(.*test_mcp.py:\d+\): .*{message}"):
        McpServer("x", **fields)


def test_two_servers_of_one_name_are_refused() -> None:
    with pytest.raises(AppError, match=r"two MCP servers called 'probe', at .*:\d+ and .*:\d+: rename one"):
        app_of(probe(), probe())
    with pytest.raises(AppError, match="tool_order names a tool twice"):
        app_of(tool_order=["a", "a"])
