"""Pages of a list: sizes, and opaque tokens that name the last row of the page before."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from nightschool_server.errors import InvalidRequestError

DEFAULT_SIZE = 50
MAX_SIZE = 500

Row = TypeVar("Row")


class PageRequest(Protocol):
    """What every List request carries."""

    page_size: int
    page_token: str


@dataclass(frozen=True)
class Page:
    """Which rows to read."""

    size: int
    after: tuple[Any, ...] | None
    """The sort key of the last row of the page before; None at the beginning."""
    scope: str
    """What is listed, with its filter: a token of another list is refused."""

    def cut(self, rows: Sequence[Row], key: Callable[[Row], tuple[Any, ...]]) -> tuple[Sequence[Row], str]:
        """The page out of up to `size` + 1 rows read, and the token of the next one ("" at the end)."""
        if len(rows) <= self.size:
            return rows, ""
        kept = rows[: self.size]
        return kept, _encode(self.scope, key(kept[-1]))


def page_of(request: PageRequest, scope: str) -> Page:
    """The page that a List request asks for. Raises InvalidRequestError("page_size" | "page_token")."""
    if request.page_size < 0 or request.page_size > MAX_SIZE:
        raise InvalidRequestError(
            "page_size",
            f"page_size is {request.page_size}, but must lie between 0 and {MAX_SIZE}: 0 takes {DEFAULT_SIZE}",
        )
    after = _decode(scope, request.page_token) if request.page_token else None
    return Page(request.page_size or DEFAULT_SIZE, after, scope)


def _encode(scope: str, key: tuple[Any, ...]) -> str:
    return base64.urlsafe_b64encode(json.dumps([scope, *key]).encode()).decode()


def _decode(scope: str, token: str) -> tuple[Any, ...]:
    try:
        value = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError):
        value = None
    if not isinstance(value, list) or len(value) < 2 or value[0] != scope:
        raise InvalidRequestError(
            "page_token",
            f"page_token {token[:80]!r} is not one that this list gave: send next_page_token of the page before, "
            "with the same filter, or leave it out for the first page",
        )
    return tuple(value[1:])
