"""The shop's three kinds of tools with its trained model: functions, the catalogue's MCP server, a till's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from nightschool import Client, Tool
from nightschool_server.agent.toolbox import list_tools
from nightschool_server.chat import ToolSpec

from examples.shop import till
from examples.shop.catalogue import price_of
from examples.shop.toolbox import TOOLS
from tests.harness import ROOT, Running, server_thread

QUESTION = "What do 3 of the plain mug cost Emma?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("till") / "home"
    with server_thread(home, {"agent.app": "examples.shop.till:app"}) as running:
        yield running


async def test_the_tills_tools_and_its_calculator_are_the_shops_to_the_model() -> None:
    brought = Tool.of(till.calculator).proto()
    calculator = ToolSpec(brought.name, brought.description, brought.parameters_json)
    offered = {spec.name: spec for spec in await list_tools(till.app)}
    assert "calculator" not in offered
    for spec in TOOLS:
        mine = calculator if spec.name == "calculator" else offered[spec.name]
        assert (mine.name, mine.description, mine.schema) == (spec.name, spec.description, spec.schema)


def test_a_task_at_the_till_uses_the_catalogue_and_the_tills_calculator(server: Running) -> None:
    environment = {**os.environ, "NIGHTSCHOOL_ADDRESS": server.address, "NIGHTSCHOOL_TOKEN": token_of(server)}
    command = [sys.executable, "-m", "examples.shop.till"]
    done = subprocess.run([*command, QUESTION], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["server: price {'item': 'plain mug'}", f"  {price_of('plain mug')}"]
    wrong = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr.startswith("usage: ")) == (2, True)


def test_the_calculator_runs_at_the_client(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(server.address, token=token_of(server)) as client:
        assert till.serve_customer(client, "Hugo asks for 92 plus 39.") == "131"
    assert capsys.readouterr().out.splitlines()[:2] == ["till: calculator {'expression': '92 + 39'}", "  131"]


def token_of(server: Running) -> str:
    return server.user[0][1].removeprefix("Bearer ")
