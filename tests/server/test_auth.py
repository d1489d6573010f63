"""Tokens: made once, kept as hashes, revoked at once; the command line's own."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from nightschool_server.auth import Caller, Tokens
from nightschool_server.errors import AlreadyExistsError, AuthenticationError, InvalidRequestError, NotFoundError
from nightschool_server.home import Home
from nightschool_server.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(Home(tmp_path / "home"))
    yield opened
    opened.close()


def test_a_token_names_its_caller_and_scope(store: Store) -> None:
    tokens = Tokens(store)
    alice, root = tokens.create("alice", "user"), tokens.create("root", "admin")
    assert alice.startswith("ns_")
    assert tokens.authenticate(alice) == Caller("alice", "user")
    assert tokens.authenticate(root) == Caller("root", "admin")


@pytest.mark.parametrize("token", ["", "ns_", "ns_guess", "x" * 10_000, "\u00e9"])
def test_an_unknown_token_is_refused(store: Store, token: str) -> None:
    tokens = Tokens(store)
    tokens.create("alice", "user")
    with pytest.raises(AuthenticationError):
        tokens.authenticate(token)


def test_the_token_itself_is_nowhere_in_the_home(store: Store) -> None:
    token = Tokens(store).create("alice", "user")
    held = b"".join(path.read_bytes() for path in store.home.path.rglob("*") if path.is_file())
    assert token.encode() not in held


def test_a_revoked_token_is_refused_at_once(store: Store) -> None:
    tokens = Tokens(store)
    token = tokens.create("alice", "user")
    tokens.authenticate(token)
    tokens.revoke("alice")
    with pytest.raises(AuthenticationError):
        tokens.authenticate(token)
    assert [record.revoked_at is not None for record in tokens.list()] == [True]


def test_a_token_made_by_another_process_is_known_at_once(store: Store) -> None:
    tokens = Tokens(store)
    tokens.authenticate(tokens.create("alice", "user"))
    made_elsewhere = Tokens(Store.open(store.home)).create("bob", "user")
    assert tokens.authenticate(made_elsewhere).name == "bob"


def test_a_name_is_never_given_twice(store: Store) -> None:
    tokens = Tokens(store)
    tokens.create("alice", "user")
    tokens.revoke("alice")
    with pytest.raises(AlreadyExistsError):
        tokens.create("alice", "user")


def test_names_and_scopes_are_checked(store: Store) -> None:
    tokens = Tokens(store)
    for name in ("", "a b", "-a", "a" * 65, "a\n"):
        with pytest.raises(InvalidRequestError, match="token name"):
            tokens.create(name, "user")
    with pytest.raises(InvalidRequestError, match="user, admin"):
        tokens.create("alice", "root")  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        tokens.revoke("nobody")


def test_the_command_line_gets_an_admin_token_that_only_this_user_reads(store: Store) -> None:
    tokens, home = Tokens(store), store.home
    tokens.ensure_home_tokens(home)
    assert tokens.authenticate(home.learner_token.read_text().strip()) == Caller("learner", "admin")
    assert stat.S_IMODE(home.learner_token.stat().st_mode) == 0o600
    token = home.cli_token.read_text().strip()
    assert tokens.authenticate(token) == Caller("cli", "admin")
    assert stat.S_IMODE(home.cli_token.stat().st_mode) == 0o600
    tokens.ensure_home_tokens(home)
    assert home.cli_token.read_text().strip() == token


@pytest.mark.parametrize("damage", [None, "", "ns_other", "\x00\xff"])
def test_a_lost_command_line_token_is_made_anew_and_the_old_one_refused(store: Store, damage: str | None) -> None:
    tokens, home = Tokens(store), store.home
    tokens.ensure_home_tokens(home)
    old = home.cli_token.read_text().strip()
    if damage is None:
        home.cli_token.unlink()
    else:
        home.cli_token.write_bytes(damage.encode("latin-1"))
    tokens.ensure_home_tokens(home)
    assert tokens.authenticate(home.cli_token.read_text().strip()).scope == "admin"
    with pytest.raises(AuthenticationError):
        tokens.authenticate(old)
