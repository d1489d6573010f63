"""Idempotency keys of admin writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_server.errors import AlreadyExistsError
from nightschool_server.home import Home
from nightschool_server.service.replies import Replies, ReplyKey
from nightschool_server.store.store import Store

KEY = ReplyKey("cli", "k", "PromoteAdapter", "digest")


def test_a_repeated_call_gets_the_first_reply(tmp_path: Path) -> None:
    replies = Replies(Store.open(Home(tmp_path / "home")))
    assert replies.get(KEY) is None
    assert replies.put(KEY, b"first") == b"first"
    assert replies.get(KEY) == b"first"
    assert replies.put(KEY, b"second") == b"first"
    assert replies.get(replace(KEY, caller="other")) is None


@pytest.mark.parametrize("change", [{"method": "RollbackAdapter"}, {"digest": "other"}])
def test_a_key_serves_one_call_only(tmp_path: Path, change: dict[str, str]) -> None:
    replies = Replies(Store.open(Home(tmp_path / "home")))
    replies.put(KEY, b"first")
    other = replace(KEY, **change)  # type: ignore[arg-type]
    with pytest.raises(AlreadyExistsError, match="PromoteAdapter"):
        replies.get(other)
    with pytest.raises(AlreadyExistsError, match="PromoteAdapter"):
        replies.put(other, b"second")
    assert replies.get(KEY) == b"first"
