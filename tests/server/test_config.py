"""Every setting from file, environment and command line, and what is said of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nightschool_server.config.config import (
    Config,
    apply_overrides,
    dump_json,
    dump_toml,
    load_config,
    settings,
    split_overrides,
    to_environment,
)
from nightschool_server.errors import ConfigError
from nightschool_server.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def refusal(home: Home, toml: str = "", environ: dict[str, str] | None = None, **overrides: str) -> str:
    home.config.write_text(toml)
    given = {key.replace("__", "."): text for key, text in overrides.items()}
    with pytest.raises(ConfigError) as caught:
        load_config(home, environ or {}, given)
    return str(caught.value)


def test_a_home_without_a_file_has_the_defaults(home: Home) -> None:
    assert load_config(home, {}) == Config()


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(home: Home) -> None:
    home.config.write_text("[server]\nport = 1\ndrain_s = 1\nmax_concurrent_requests = 1\n")
    environ = {"NIGHTSCHOOL__SERVER__PORT": "2", "NIGHTSCHOOL__SERVER__DRAIN_S": "2", "PATH": "/bin"}
    config = load_config(home, environ, {"server.port": "3"})
    assert (config.server.port, config.server.drain_s, config.server.max_concurrent_requests) == (3, 2.0, 1)


def test_text_becomes_what_the_key_is(home: Home) -> None:
    config = load_config(
        home,
        {"NIGHTSCHOOL__LEARNER__TRAIN__TARGET_MODULES": '["q_proj", "v_proj"]'},
        {"engine.model": "7", "learner.enabled": "false", "learner.gate.max_p": "0.5", "agent.app": "shop:app"},
    )
    assert config.learner.train.target_modules == ("q_proj", "v_proj")
    assert config.engine.model == "7"
    assert config.learner.enabled is False
    assert config.learner.gate.max_p == 0.5
    assert config.app == "shop:app"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("server.prot", "server.port"),
        ("sever.port", "server.port"),
        ("learner.trian.beta", "learner.train.beta"),
        ("server.port.number", "server.port"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(home: Home, wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{wrong}'.*{near}"):
        load_config(home, {}, {wrong: "1"})


def test_an_unknown_key_names_its_file_or_variable(home: Home) -> None:
    assert str(home.config) in refusal(home, "[server]\nprot = 1\n")
    assert "NIGHTSCHOOL__SERVER__PROT" in refusal(home, environ={"NIGHTSCHOOL__SERVER__PROT": "1"})


def test_a_wrong_value_names_key_value_origin_and_rule(home: Home) -> None:
    said = refusal(home, server__port="99999")
    assert all(part in said for part in ("server.port", "99999", "command line", "65535"))
    said = refusal(home, environ={"NIGHTSCHOOL__LOG__DEFAULT_POLICY": "sell"})
    assert all(part in said for part in ("log.default_policy", "'sell'", "NIGHTSCHOOL__LOG__DEFAULT_POLICY", "'train'"))


def test_a_file_that_is_not_toml_is_refused_with_the_line(home: Home) -> None:
    assert "line 2" in refusal(home, "[server]\nport = = 1\n")


def test_a_section_is_not_a_value(home: Home) -> None:
    assert "is a section" in refusal(home, server="1")
    assert "is a section" in refusal(home, "server = 1")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", "::"])
def test_a_reachable_host_needs_tls_or_consent(home: Home, host: str) -> None:
    said = refusal(home, server__host=host)
    assert "allow_insecure" in said
    assert "tls_cert" in said
    given = {"server.host": host, "server.allow_insecure": "true"}
    assert load_config(home, {}, given).server.host == host
    given = {"server.host": host, "server.tls_cert": "c.pem", "server.tls_key": "k.pem"}
    assert load_config(home, {}, given).server.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_loopback_needs_neither(home: Home, host: str) -> None:
    assert load_config(home, {}, {"server.host": host}).server.host == host


def test_settings_that_contradict_each_other_are_refused(home: Home) -> None:
    assert "belong together" in refusal(home, server__tls_cert="c.pem")
    assert "max_deadline_s" in refusal(home, server__default_deadline_s="700")


def test_what_is_dumped_is_read_back(home: Home) -> None:
    config = load_config(
        home,
        {},
        {
            "engine.model": 'a "b" \\c\n\u00e9',
            "learner.train.target_modules": '["q"]',
            "sessions.idle_timeout_s": "1.5",
        },
    )
    home.config.write_text(dump_toml(config))
    assert load_config(home, {}) == config
    assert Config.model_validate_json(dump_json(config)) == config


def test_overrides_of_a_cycle_are_checked_like_every_other(home: Home) -> None:
    config = apply_overrides(Config(), ["learner.synthesize.num_tasks=20", "learner.gate.max_p = 0.5"])
    assert (config.learner.synthesize.num_tasks, config.learner.gate.max_p) == (20, 0.5)
    assert Config().learner.synthesize.num_tasks != 20
    for wrong in ("learner.synthesize.num_task=20", "learner.synthesize.num_tasks=0", "num_tasks", "=1"):
        with pytest.raises(ConfigError):
            apply_overrides(Config(), [wrong])


def test_the_command_line_reaches_a_child_through_its_environment(home: Home) -> None:
    given = split_overrides(["engine.model=a=b", "learner.gate.max_p=0.5"])
    assert given["engine.model"] == "a=b"
    assert load_config(home, to_environment(given)) == load_config(home, {}, given)


def test_the_documentation_lists_every_setting_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    missing = [setting.key for setting in settings() if setting.row() not in text]
    assert not missing, "the table is what `python -m nightschool_server.config.config` prints: replace it"
    known = {setting.key for setting in settings()}
    stale = [line for line in text.splitlines() if line.startswith("| `") and line.split("`")[1] not in known]
    assert not stale


def test_every_default_is_written_as_toml_would_take_it() -> None:
    assert json.dumps(Config().server.host) in next(s.row() for s in settings() if s.key == "server.host")
