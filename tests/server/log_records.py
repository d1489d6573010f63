"""Records for tests of the request log."""

from __future__ import annotations

import time
from typing import Any

from nightschool_server.chat import assistant, user
from nightschool_server.store.request_log import LoggedMessage, RequestRecord


def record(name: str, question: str = "How many apples?", **changes: Any) -> RequestRecord:
    """An answered request whose response_id is `name`."""
    values: dict[str, Any] = {
        "id": name,
        "method": "generate",
        "caller": "alice",
        "adapter": "base",
        "policy": "train",
        "status": "OK",
        "created_at": time.time(),
        "ended_at": time.time(),
        "digest": "d",
        "response": b"reply",
        "sampling": {"max_tokens": 5},
        "tools": ({"name": "add"},),
        "prompt_tokens": 3,
        "messages": (LoggedMessage(user(question)), LoggedMessage(assistant("Seven."), sampled=True)),
    }
    return RequestRecord(**{**values, **changes})
