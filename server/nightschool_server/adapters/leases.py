"""Who holds which adapter now: requests while they run, sessions until they idle out.

Counts in memory only. Sessions are written when the active pointer moves, in its transaction, and now and then: a
session that a crash loses was on the active adapter, and finds it again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from nightschool_server.adapters.rows import SessionRow


@dataclass(frozen=True)
class Lease:
    """The right of one request to its adapter."""

    adapter: str


class Leases:
    """Requests in flight by adapter."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def hold(self, name: str) -> None:
        """One request more."""
        self._counts[name] += 1

    def release(self, name: str) -> None:
        """One request less."""
        assert self._counts[name] > 0, f"{name} is not held"
        self._counts[name] -= 1

    def count(self, name: str) -> int:
        """How many requests hold it."""
        return self._counts[name]


class Sessions:
    """The adapter of every live session, the longest idle first."""

    def __init__(self, idle_timeout_s: float, max_sessions: int, now: Callable[[], float]) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._max_sessions = max_sessions
        self._now = now
        self._rows: OrderedDict[tuple[str, str], SessionRow] = OrderedDict()
        self._counts: Counter[str] = Counter()

    @property
    def used_since(self) -> float:
        """A session that was last used before this has idled out."""
        return self._now() - self._idle_timeout_s

    def adapter_of(self, caller: str, session_id: str) -> str | None:
        """The session's adapter, and a sign of life; None for a new session."""
        self.expire()
        row = self._rows.get((caller, session_id))
        if row is None:
            return None
        self._rows[caller, session_id] = replace(row, last_used_at=self._now())
        self._rows.move_to_end((caller, session_id))
        return row.adapter

    def begin(self, caller: str, session_id: str, adapter: str) -> None:
        """Bind a session to an adapter."""
        self._end((caller, session_id))
        now = self._now()
        self._rows[caller, session_id] = SessionRow(caller, session_id, adapter, now, now)
        self._counts[adapter] += 1
        while len(self._rows) > self._max_sessions:
            self._end(next(iter(self._rows)))

    def end_all_on(self, adapter: str) -> None:
        """End every session of an adapter that may serve no more; its next request is routed afresh."""
        for key in [key for key, row in self._rows.items() if row.adapter == adapter]:
            self._end(key)

    def end_all_of(self, caller: str) -> None:
        """End every session of a caller."""
        for key in [key for key in self._rows if key[0] == caller]:
            self._end(key)

    def expire(self) -> None:
        """End what idled out."""
        while self._rows and next(iter(self._rows.values())).last_used_at < self.used_since:
            self._end(next(iter(self._rows)))

    def count(self, adapter: str) -> int:
        """How many sessions are on it."""
        return self._counts[adapter]

    def rows(self, used_since: float = float("-inf")) -> list[SessionRow]:
        """Every session that was used since then."""
        return [row for row in self._rows.values() if row.last_used_at >= used_since]

    def restore(self, rows: Iterable[SessionRow]) -> None:
        """Take up the sessions of an earlier process, the longest idle first."""
        for row in rows:
            self._rows[row.caller, row.id] = row
            self._counts[row.adapter] += 1

    def _end(self, key: tuple[str, str]) -> None:
        row = self._rows.pop(key, None)
        if row is not None:
            self._counts[row.adapter] -= 1
