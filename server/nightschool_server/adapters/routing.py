"""Which adapter answers a request: the one it is pinned to, its session's, or the active one.

Owns the leases and the sessions, and the present route in memory; the registry changes the route (`registry.py`), the
adapters in the engine are `loaded.py`'s. Everything here but the load itself runs without an await, so that a request
is on one side of a change or on the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from nightschool_server.adapters import rows as adapter_rows
from nightschool_server.adapters.leases import Lease, Leases, Sessions
from nightschool_server.adapters.loaded import LoadedAdapters
from nightschool_server.adapters.rows import Route
from nightschool_server.config.serving import SessionsConfig
from nightschool_server.engine import BASE
from nightschool_server.errors import (
    AdapterFormatError,
    FailedPreconditionError,
    PermissionError_,
    UnknownAdapterError,
)
from nightschool_server.store.store import Store

PROVEN = frozenset({"active", "canary", "retired"})
"""States of adapters that passed the gate, or were forced on the record: any caller may pin them."""


class Router:
    """Leases adapters to requests."""

    def __init__(self, store: Store, config: SessionsConfig, now: Callable[[], float]) -> None:
        self._store = store
        self.leases = Leases()
        self.sessions = Sessions(config.idle_timeout_s, config.max_sessions, now)
        self.current = Route(BASE, BASE, 0.0)

    @asynccontextmanager
    async def lease(
        self, loaded: LoadedAdapters, session_id: str | None, pinned: str | None, caller: str, *, unproven: bool
    ) -> AsyncIterator[Lease]:
        """Hold the adapter of a request while it runs; see `AdapterRegistry.route`."""
        name = self._pinned(pinned, unproven) if pinned else self._of_session(session_id, caller)
        self.leases.hold(name)
        try:
            try:
                await loaded.ensure(name, may_exceed=not pinned)
            except (AdapterFormatError, UnknownAdapterError, FailedPreconditionError) as error:
                if pinned:
                    raise FailedPreconditionError(f"adapter {name!r} cannot serve: {error}") from error
                # The adapter of an old session does not serve any more. The active one is loaded.
                self.sessions.end_all_on(name)
                self.leases.release(name)
                name = self._of_session(session_id, caller)
                self.leases.hold(name)
            yield Lease(name)
        finally:
            self.leases.release(name)

    def is_held(self, name: str) -> bool:
        """Whether an adapter must stay in the engine."""
        return name in (self.current.active, self.current.previous) or self.num_leases(name) > 0

    def num_leases(self, name: str) -> int:
        """Requests and sessions that hold it."""
        return self.leases.count(name) + self.sessions.count(name)

    def _pinned(self, name: str, unproven: bool) -> str:
        if name == BASE:
            return BASE
        state = adapter_rows.get_state(self._store, name)
        if state is None:
            raise UnknownAdapterError(name)
        if state == "quarantined":
            raise FailedPreconditionError(f"adapter {name!r} is quarantined: see `nightschool adapters show {name}`")
        if state not in PROVEN and not unproven:
            raise PermissionError_(
                f"adapter {name!r} is a {state} one that has not passed the gate: pinning it needs the admin scope"
            )
        return name

    def _of_session(self, session_id: str | None, caller: str) -> str:
        if not session_id:
            return self.current.active
        adapter = self.sessions.adapter_of(caller, session_id)
        if adapter is None:
            adapter = self.current.active
            self.sessions.begin(caller, session_id, adapter)
        return adapter
