"""The README's example, against a real server of the shop, prints what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness import server_thread

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README.read_text(), re.S)
    code, output = found
    with server_thread(tmp_path, {"agent.app": "examples.shop.app:app"}):
        monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path))
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == output
