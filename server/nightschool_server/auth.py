"""Who may call: bearer tokens with a name and a scope, kept as sha256.

A token has 256 random bits, so a plain hash is enough: there is nothing to guess. It is shown once, when it is made.
Owns the table `tokens` and the files `cli.token` and `learner.token`; what a scope allows is the interceptor's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nightschool_server.errors import AlreadyExistsError, AuthenticationError, InvalidRequestError, NotFoundError
from nightschool_server.home import Home
from nightschool_server.store.durable import write_file
from nightschool_server.store.store import Row, Store

Scope = Literal["user", "admin"]

TOKEN_PREFIX = "ns_"
CLI_NAME, LEARNER_NAME = "cli", "learner"
"""The callers' names behind `cli.token` and `learner.token`."""

CACHE_S = 5.0
"""How long another process's revocation may go unnoticed; one made here counts at once."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")


@dataclass(frozen=True)
class Caller:
    """Who makes a call."""

    name: str
    scope: Scope


@dataclass(frozen=True)
class TokenRecord:
    """What is known of a token; the token itself is not."""

    name: str
    scope: Scope
    created_at: float
    revoked_at: float | None


class Tokens:
    """The tokens of one store. May be used from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._callers: dict[str, Caller] = {}
        self._read_at = float("-inf")

    def create(self, name: str, scope: Scope) -> str:
        """Make a token for `name` and return it, the only time that it can be read.

        Raises InvalidRequestError for a name or scope that breaks its rule, AlreadyExistsError for a name in use, which
        a revoked one stays: what was logged under it must not become another's.
        """
        if _NAME.fullmatch(name) is None:
            raise InvalidRequestError(
                "name",
                f"token name {name!r} must be 1 to 64 letters, digits, '_', '.', '@' or '-', a letter or digit first",
            )
        if scope not in get_args(Scope):
            raise InvalidRequestError("scope", f"scope {scope!r} must be one of {', '.join(get_args(Scope))}")
        token = _new_token()
        with self._store.transaction() as db:
            if self._store.one("SELECT 1 FROM tokens WHERE name = ?", (name,)) is not None:
                raise AlreadyExistsError(f"a token named {name!r} exists or existed: choose another name")
            db.execute(
                "INSERT INTO tokens (name, scope, sha256, created_at) VALUES (?, ?, ?, ?)",
                (name, scope, _digest(token), time.time()),
            )
        self._forget_cache()
        return token

    def revoke(self, name: str) -> None:
        """Refuse the token of `name` from now on. Raises NotFoundError."""
        with self._store.transaction() as db:
            changed = db.execute(
                "UPDATE tokens SET revoked_at = COALESCE(revoked_at, ?) WHERE name = ?", (time.time(), name)
            )
            if changed.rowcount == 0:
                raise NotFoundError("token", name, f"there is no token named {name!r}")
        self._forget_cache()

    def list(self) -> list[TokenRecord]:
        """Every token, oldest first."""
        rows = self._store.query("SELECT name, scope, created_at, revoked_at FROM tokens ORDER BY created_at, name")
        return [TokenRecord(**row) for row in rows]

    def authenticate(self, token: str) -> Caller:
        """The caller behind `token`. Raises AuthenticationError.

        Takes the same time for every unknown token: the hash that is compared is not one that a caller can steer.
        """
        digest = _digest(token)
        with self._lock:
            if time.monotonic() - self._read_at > CACHE_S:
                self._read()
            found = self._callers.get(digest)
            if found is None:
                # A token made by another process, e.g. `token create` beside a running server.
                self._read()
                found = self._callers.get(digest)
        if found is None:
            raise AuthenticationError("the token is not known or was revoked: ask the operator for a new one")
        return found

    def ensure_home_tokens(self, home: Home) -> None:
        """Write admin tokens for this machine's command line and learner, unless those that are there still work."""
        self._ensure(CLI_NAME, home.cli_token)
        self._ensure(LEARNER_NAME, home.learner_token)

    def _ensure(self, name: str, path: Path) -> None:
        try:
            token = path.read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            token = ""
        if token and self._is_admin(name, token):
            path.chmod(0o600)
            return
        token = _new_token()
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO tokens (name, scope, sha256, created_at) VALUES (?, 'admin', ?, ?) ON CONFLICT (name) "
                "DO UPDATE SET scope = 'admin', sha256 = excluded.sha256, created_at = excluded.created_at, "
                "revoked_at = NULL",
                (name, _digest(token), time.time()),
            )
        self._forget_cache()
        write_file(path, token.encode() + b"\n")

    def _is_admin(self, name: str, token: str) -> bool:
        row: Row | None = self._store.one("SELECT sha256, scope, revoked_at FROM tokens WHERE name = ?", (name,))
        if row is None or row["revoked_at"] is not None or row["scope"] != "admin":
            return False
        return hmac.compare_digest(row["sha256"], _digest(token))

    def _read(self) -> None:
        rows = self._store.query("SELECT name, scope, sha256 FROM tokens WHERE revoked_at IS NULL")
        self._callers = {row["sha256"]: Caller(row["name"], row["scope"]) for row in rows}
        self._read_at = time.monotonic()

    def _forget_cache(self) -> None:
        with self._lock:
            self._read_at = float("-inf")


def _new_token() -> str:
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
