"""The pages of docs/: every example is Python, every application in them can be served, the client's tools' page does
what it says."""

from __future__ import annotations

import asyncio
import re
import textwrap
from pathlib import Path

import pytest
from nightschool_server.agent.toolbox import list_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import load_app

from tests.harness import server_thread
from tests.server.scripted_engine import ScriptedEngine

DOCS = Path(__file__).resolve().parents[2] / "docs"
APPLICATION = re.compile(r"^from nightschool_server.app import .*^app = App\(", re.M | re.S)


def examples(page: str) -> list[str]:
    """The Python in a page, in its order."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", (DOCS / page).read_text(), re.S | re.M)
    return [textwrap.dedent(code) for _, code in found]


PAGES = sorted(path.name for path in DOCS.glob("*.md") if examples(path.name))
WITH_APPLICATION = [page for page in PAGES if any(APPLICATION.search(code) for code in examples(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_example_is_python(page: str) -> None:
    for code in examples(page):
        compile("async def example():\n" + textwrap.indent(code, " "), page, "exec")


@pytest.mark.parametrize("page", WITH_APPLICATION)
def test_every_application_can_be_served(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, code in enumerate(examples(page)):
        if APPLICATION.search(code):
            module = f"{Path(page).stem.replace('-', '_')}_page_{number}"
            (tmp_path / f"{module}.py").write_text(code)
            app = load_app(f"{module}:app")
            assert app.mcp or len(asyncio.run(list_tools(app))) == len(app.tools)
            assert app.mcp or app.tools or app.scorer


def test_the_clients_tools_do_what_their_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = examples("tools-client.md")
    (output,) = re.findall(r"```text\n(.*?)```", (DOCS / "tools-client.md").read_text(), re.S)
    answers = [write_call("shelf_of", {"item": "moon"}), write_call("shelf_of", {"item": "mug"}), "On shelf A3."]
    engine = ScriptedEngine(lambda request: answers[len(engine.requests) - 1])

    async def start() -> ScriptedEngine:
        return engine

    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path))
    with server_thread(tmp_path, {"agent.app": "tests.server.tools_app:app"}, start):
        capsys.readouterr()
        exec(compile(code, "tools-client.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == output
    assert engine.requests[0].prompt.tools[-1].name == "shelf_of"
