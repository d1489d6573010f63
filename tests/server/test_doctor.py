"""`nightschool doctor` on this machine: what it says, what it takes for a fault, and that it changes nothing."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from nightschool_server.home import Home
from nightschool_server.main import main
from nightschool_server.placement import MODES
from nightschool_server.serving import locked

from tests.server.sandboxes import needs_sandbox

MODEL = str(Path(__file__).resolve().parents[2] / "examples" / "shop" / "model")
APP = "examples.shop.app:app"


def doctor(capsys: pytest.CaptureFixture[str], home: Path, *arguments: str) -> tuple[int, dict[tuple[str, str], str]]:
    """The exit code and the state by group and name; the texts under (group, name, "text")."""
    code = main(["doctor", "--home", str(home), "--json", "--port", "0", *arguments])
    findings = json.loads(capsys.readouterr().out)
    return code, {(one["group"], one["name"]): f"{one['state']}: {one['text']}" for one in findings}


def test_a_machine_that_can_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    code, found = doctor(capsys, home, "--model", MODEL, "--app", APP, "--engine", "transformers")
    assert code == 0
    assert found["app", ""].startswith("ok: examples.shop.app:app: 3 tools, 1 MCP server, 440 held-out tasks")
    assert found["model", ""].startswith("ok")
    assert found["engine", "transformers"].endswith("would be taken")
    assert {name for group, name in found if group == "training"} == {*MODES, "as configured"}
    assert found["training", "sleep"].startswith("no")
    assert not home.exists()


def test_what_would_stop_a_start_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(capsys, tmp_path, "--model", str(tmp_path / "nowhere"), "--app", "no.such:app")
    assert code == 1
    assert found["model", ""].startswith("fault")
    assert "no module 'no'" in found["app", ""]
    code, found = doctor(capsys, tmp_path)
    assert (code, found["model", ""].partition(":")[0]) == (1, "fault")


def test_a_port_in_use_is_a_fault_and_a_home_in_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Home(tmp_path).create()
    with socket.socket() as taken, locked(home):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, found = doctor(capsys, tmp_path, "--model", MODEL, "--port", port)
    assert code == 1
    assert found["port", ""].startswith("fault")
    assert "another server" in found["home", ""]


def test_a_placement_that_cannot_be_is_a_fault_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = doctor(capsys, tmp_path, "--model", MODEL, "--set", "learner.train.device=cuda:7")
    assert code == 1
    assert "learner.train.device" in found["training", "as configured"]


def test_the_text_form_has_one_line_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--home", str(tmp_path), "--model", MODEL, "--port", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine")
    assert sum("as configured" in line for line in lines) == 1


@needs_sandbox
def test_the_sandbox_is_named_and_one_that_is_needed_and_missing_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ("--set", "agent.action_format=code")
    _, found = doctor(capsys, tmp_path, "--model", MODEL)
    assert re.match(r"ok: bubblewrap \d.*; used with agent.action_format", found["sandbox", ""])
    _, found = doctor(capsys, tmp_path, "--model", MODEL, *code, "--set", "agent.unsafe_code=true")
    assert found["sandbox", ""].startswith("no: UNSAFE: agent.unsafe_code is set")
    monkeypatch.setenv("PATH", str(tmp_path))
    _, found = doctor(capsys, tmp_path, "--model", MODEL)
    assert found["sandbox", ""].startswith("no: code actions need a sandbox: bwrap is not on the PATH")
    exit_code, found = doctor(capsys, tmp_path, "--model", MODEL, *code)
    assert (exit_code, found["sandbox", ""].partition(":")[0]) == (1, "fault")
    files = ("--set", "learner.synthesize.files.enabled=true", "--set", "learner.synthesize.max_tokens=600")
    exit_code, found = doctor(capsys, tmp_path, "--model", MODEL, *files)
    assert (exit_code, found["sandbox", ""].partition(":")[0]) == (1, "fault")
