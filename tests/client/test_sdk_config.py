"""Where a client finds its server and its token."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from nightschool import Client, ConfigError
from nightschool.config import DEFAULT_ADDRESS, MAX_TIMEOUT_S, is_loopback, resolve

from tests.client.fake_server import FakeServer


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NIGHTSCHOOL_HOME", "NIGHTSCHOOL_ADDRESS", "NIGHTSCHOOL_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder as a running server leaves it."""
    (tmp_path / "server.json").write_text(json.dumps({"address": "127.0.0.1:7777", "pid": 1, "version": "0"}))
    (tmp_path / "cli.token").write_text("from-the-home\n")
    return tmp_path


def test_arguments_win_over_the_environment_and_that_over_the_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(home=home)
    assert (found.address, found.token) == ("127.0.0.1:7777", "from-the-home")
    monkeypatch.setenv("NIGHTSCHOOL_ADDRESS", "127.0.0.1:8888")
    monkeypatch.setenv("NIGHTSCHOOL_TOKEN", "from-the-environment")
    found = resolve(home=home)
    assert (found.address, found.token) == ("127.0.0.1:8888", "from-the-environment")
    found = resolve("127.0.0.1:9999", token="given", home=home)
    assert (found.address, found.token) == ("127.0.0.1:9999", "given")


def test_the_home_comes_from_the_environment_or_is_the_user_s(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve().home == Path("~/.nightschool").expanduser()
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(home))
    assert resolve().address == "127.0.0.1:7777"


def test_an_empty_home_gives_the_default_address_and_no_token(tmp_path: Path) -> None:
    found = resolve(home=tmp_path / "missing")
    assert (found.address, found.token) == (DEFAULT_ADDRESS, "")


def test_the_token_of_this_machine_never_travels_to_another(home: Path) -> None:
    assert resolve("example.org:50051", home=home).token == ""
    assert resolve("localhost:50051", home=home).token == "from-the-home"


def test_tls_is_for_other_machines_unless_said_otherwise(home: Path) -> None:
    assert resolve("127.0.0.1:1", home=home).credentials is None
    assert resolve("example.org:1", home=home).credentials is not None
    assert resolve("example.org:1", home=home, tls=False).credentials is None
    assert resolve("127.0.0.1:1", home=home, tls=True).credentials is not None
    credentials = grpc.ssl_channel_credentials()
    assert resolve("127.0.0.1:1", home=home, tls=credentials).credentials is credentials


LOOPBACK = ["127.0.0.1:1", "127.8.0.1:1", "[::1]:1", "localhost:1", "unix:/tmp/socket"]
NETWORK = ["10.0.0.1:1", "example.org:1", "0.0.0.0:1", "localhost.example.org:1"]


def test_loopback_is_told_from_the_network() -> None:
    assert [address for address in LOOPBACK + NETWORK if is_loopback(address)] == LOOPBACK


@pytest.mark.parametrize("address", ["nonsense", "http://localhost:1", "localhost:", "localhost:99999", ":1"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        resolve(address, home=tmp_path)


def test_broken_files_are_named(home: Path) -> None:
    (home / "server.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"server\.json"):
        resolve(home=home)
    with pytest.raises(ConfigError, match="token"):
        resolve("127.0.0.1:1", token="two words", home=home)


def test_timeouts_are_capped(home: Path) -> None:
    assert resolve(home=home, timeout_s=1e9).timeout_s == MAX_TIMEOUT_S


def test_a_client_finds_the_server_of_its_home(server: FakeServer, home: Path) -> None:
    (home / "server.json").write_text(json.dumps({"address": server.address, "pid": 1, "version": "0"}))
    (home / "cli.token").write_text("secret")
    with Client(home=home) as client:
        assert client.generate("hello").text == "echo hello"
        assert client.settings.address == server.address
