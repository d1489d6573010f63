"""docs/files.md: its application serves, its client runs, and prints what the page says. The model is scripted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nightschool_server.agent.toolcalls import write_call

from tests.harness import server_thread
from tests.server.scripted_engine import ScriptedEngine

PAGE = Path(__file__).resolve().parents[2] / "docs" / "files.md"


def test_the_pages_application_and_client_do_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    application, client = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (output,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "charts_of_the_page.py").write_text(application)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    engine = ScriptedEngine(
        lambda request: "drawn." if len(request.prompt.messages) > 2 else write_call("chart", {"name": "numbers.txt"})
    )

    async def start() -> ScriptedEngine:
        return engine

    with server_thread(tmp_path / "home", {"agent.app": "charts_of_the_page:app"}, start):
        capsys.readouterr()
        exec(compile(client, "files.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == output
    assert engine.requests[1].prompt.images, "the model sees the chart"
