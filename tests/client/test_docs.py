"""The documentation's examples run, and its tables are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from nightschool import cli
from nightschool.errors import TABLE
from nightschool.options import GenerateOptions, TaskOptions
from nightschool_proto.v1 import content_pb2

from tests.client.fake_replies import task_script
from tests.client.fake_server import TOKEN, FakeServer
from tests.client.test_cli import commands

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    f"{name} {number}": code
    for name in ("README.md", "docs/sdk.md")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example: str, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server.json").write_text(json.dumps({"address": server.address, "pid": 1, "version": "0"}))
    (tmp_path / "cli.token").write_text(TOKEN)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path))
    call = content_pb2.ToolCall(id="c", name="shelf_of", arguments_json='{"item": "mug"}')
    server.script["RunTask"].extend([task_script(call)] * 2)
    exec(compile(EXAMPLES[example], example, "exec"), {"__name__": "example"})
    assert server.calls or "with Client()" not in EXAMPLES[example]


def test_every_command_is_in_the_documentation() -> None:
    text = (ROOT / "docs/cli.md").read_text().replace(" [list]", " list")
    leaves = [" ".join(path) for path, command in commands(cli.nightschool) if not hasattr(command, "commands")]
    assert [leaf for leaf in leaves if f"`{leaf}" not in text] == []


def test_every_status_and_option_is_in_the_documentation() -> None:
    text = (ROOT / "docs/sdk.md").read_text()
    words = {code.name for code in TABLE} | {cls.__name__ for cls in TABLE.values()}
    options = GenerateOptions.__optional_keys__ | TaskOptions.__optional_keys__
    assert [word for word in sorted(words | options) if word not in text] == []
