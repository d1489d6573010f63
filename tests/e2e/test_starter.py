"""What `nightschool init` writes runs as its README says: its own tests, the check, a server, the client."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from nightschool.cli import nightschool
from nightschool.cli.init import starter_files
from nightschool_server.config.config import load_config
from nightschool_server.home import Home

from tests.harness import SHOP_MODEL, ServerProcess

RULES = "E,F,W,I,UP,B,SIM,RUF"


def init(folder: Path) -> Result:
    result = CliRunner().invoke(nightschool, ["init", str(folder)])
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starter") / "my agent"
    assert init(folder).exit_code == 0
    return folder


def run(starter: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NIGHTSCHOOL_HOME": str(starter / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=starter, env=environment, capture_output=True, text=True, check=False)


def test_it_writes_every_file_and_names_the_application_after_the_folder(tmp_path: Path) -> None:
    result = init(tmp_path / "new" / "my-agent")
    folder = tmp_path / "new" / "my-agent"
    written = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert written == [path for path, _ in starter_files()]
    assert {"app.py", "client.py", "test_app.py", "README.md", ".gitignore"} <= {path.name for path in written}
    assert result.stdout.splitlines() == [str(folder / path) for path, _ in starter_files()]
    assert 'name="my-agent"' in (folder / "app.py").read_text()
    assert (folder / "README.md").read_text().startswith("# my-agent\n")


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused = init(tmp_path)
    assert refused.exit_code == 2
    assert "is not empty (mine.txt is in it): name a folder that is empty or new" in refused.stderr
    assert init(tmp_path / "mine.txt").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_it_writes_is_clean_and_its_own_tests_pass(starter: Path) -> None:
    linted = run(
        starter, sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=120", "--select", RULES, "."
    )
    assert linted.returncode == 0, linted.stdout
    tested = run(starter, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout


def test_its_settings_are_read_and_its_commands_are_commands(starter: Path) -> None:
    config = load_config(Home(starter / "home"), environ={})
    assert (config.app, config.learner.promote.approval) == ("app:app", "manual")
    named = re.findall(r"^nightschool (\w+)", (starter / "README.md").read_text(), re.M)
    assert set(named) == {"check", "serve", "status", "cycles"} <= set(nightschool.commands)


def test_the_check_finds_no_fault_and_a_client_gets_an_answer(starter: Path) -> None:
    main = "from nightschool.cli import main; main()"
    checked = run(starter, sys.executable, "-c", main, "check", "app:app", "--model", str(SHOP_MODEL))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "FAULT" not in checked.stdout
    with ServerProcess(starter / "home", "--app", "app:app", "--no-learner", folder=starter):
        asked = run(starter, sys.executable, "client.py")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == "calls price {'item': 'plain mug'}\ngets 9\nbase says 9\n"
