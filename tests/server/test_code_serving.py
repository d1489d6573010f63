"""Code actions through the real server: RunTask, a client's tools in code, the documentation's example, and the refusal
to start where there is no sandbox."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from nightschool_proto.v1 import agent_pb2, content_pb2
from nightschool_server.agent.formats import open_format
from nightschool_server.agent.loop import Episode, LiveActor, run_episode
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.app import load_app
from nightschool_server.chat import ToolResult, user
from nightschool_server.config.serving import AgentConfig
from nightschool_server.engine import GenerateRequest
from nightschool_server.errors import FailedPreconditionError
from nightschool_server.sandbox.proof import UNSAFE
from nightschool_server.tools.state import ToolState

from tests.harness import SHOP_MODEL, Stubs, server_thread
from tests.server.sandboxes import needs_sandbox
from tests.server.scripted_engine import ScriptedEngine
from tests.server.test_agent import Script
from tests.server.test_main import mistake, serve
from tests.server.test_service_tasks import World, kinds, run, start

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "code-actions.md"
ASK = {"type": "object", "properties": {"question": {"type": "string"}}, "required": ["question"]}


def tool(name: str) -> content_pb2.Tool:
    return content_pb2.Tool(name=name, description="asks the person", parameters_json=json.dumps(ASK))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = ScriptedEngine()

    async def begin() -> ScriptedEngine:
        return engine

    settings = {"agent.app": "tests.server.code_app:app", "agent.action_format": "code"}
    with server_thread(tmp_path_factory.mktemp("code") / "home", settings, begin) as server:
        yield World(server, engine)


@pytest.fixture
async def wire(world: World) -> AsyncIterator[Stubs]:
    async with world.server.stubs() as found:
        yield found


def says(world: World, *steps: str) -> None:
    def script(request: GenerateRequest) -> str:
        return steps[sum(message.role == "assistant" for message in request.prompt.messages)]

    world.engine.script = script


@needs_sandbox
async def test_code_calls_the_applications_and_the_clients_tools_and_the_stream_tells_of_each(
    wire: Stubs, world: World
) -> None:
    says(
        world,
        "```python\nmany = int(ask(question='how many?'))\ntotal = price('mug') * many\n```",
        "```python\nfinal_answer(total)\n```",
    )
    answer = content_pb2.ToolResult(name="ask", content="3")
    events = await run(wire, world, start(client_tools=[tool("ask")]), answer)
    assert kinds(events) == [
        "started", "delta", "tool_call", "tool_call", "tool_request", "tool_result", "tool_call", "tool_result",
        "tool_result", "delta", "tool_call", "tool_result", "finished",
    ]  # fmt: skip
    finished = events[-1].finished
    assert (finished.outcome, finished.answer) == (agent_pb2.TaskFinished.ANSWERED, "21")
    prompt = world.engine.requests[-1].prompt
    assert prompt.tools == ()
    assert "def ask(question: str):" in prompt.messages[0].text
    assert not list((world.server.home / "workspaces").glob("*"))


@needs_sandbox
async def test_a_clients_tool_that_meets_another_in_its_function_name_is_refused(wire: Stubs, world: World) -> None:
    with pytest.raises(Exception, match=r"'price' and 'pri.ce' are both|both pri_ce\(\) in code"):
        await run(wire, world, start(client_tools=[tool("pri.ce"), tool("pri_ce")]))


@needs_sandbox
async def test_the_example_of_the_documentation_is_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```(python|text)\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (_, module), *turns = blocks
    (tmp_path / "documented_shop.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    app = load_app("documented_shop:app")
    steps = [f"```python\n{code}```" for kind, code in turns if kind == "python"]
    expected = [text.strip() for kind, text in turns if kind == "text"]
    config = AgentConfig(action_format="code")
    async with open_tools(app, "documented_shop:app", num_workers=1) as tools, open_format(config) as written:
        episode = Episode(written.begin((user("?"),), tools.tools), ToolState.initial(app, tmp_path / "states"))
        result = await run_episode(episode, LiveActor(Script(steps), tools, action_format=written))
    seen = [part.content for message in result.messages for part in message.parts if isinstance(part, ToolResult)]
    assert seen == expected
    assert len(seen) == 3


def test_without_bubblewrap_the_start_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["--model", str(SHOP_MODEL), "--set", "agent.action_format=code"]
    said = mistake(capsys, *serve(tmp_path / "home", *arguments))
    assert "bwrap is not on the PATH" in said
    assert said.endswith("install bubblewrap 0.5 or newer and libseccomp2, or accept the risk with --unsafe-code")


async def test_unsafe_code_runs_without_a_sandbox_and_is_loud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPreconditionError):
        async with open_format(AgentConfig(action_format="code")):
            pass
    with caplog.at_level(logging.WARNING):
        async with open_format(AgentConfig(action_format="code", unsafe_code=True)) as written:
            assert written.name == "code"
    assert UNSAFE in caplog.text
