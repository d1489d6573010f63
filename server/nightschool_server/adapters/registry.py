"""The adapter registry: which adapter answers, which may, and how that changes without dropping a request.

    candidate -> active -> retired        promote moves the one active pointer; rollback moves it back
    candidate -> rejected                 the gate said no
    any -> quarantined                    damaged, or failed its proof of effect; never served again

Owns the states, the pointer, leases and sessions; lives in the server's event loop. A change of the pointer is one
transaction with its audit rows, made after the new adapter is loaded and proven and before any request sees it, so that
kill -9 leaves the old state or the new one. Changes wait for each other. Files are `folder.py`'s, rows
`rows.py`'s, loading and proof `loaded.py`'s, what a crash leaves `recovery.py`'s. The merged lane follows the pointer
in the background (`lane.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from nightschool_server.adapters import folder as adapter_folder
from nightschool_server.adapters import recovery as adapter_recovery
from nightschool_server.adapters import rows as adapter_rows
from nightschool_server.adapters.folder import Source
from nightschool_server.adapters.leases import Lease
from nightschool_server.adapters.loaded import LoadedAdapters
from nightschool_server.adapters.routing import PROVEN, Router
from nightschool_server.adapters.rows import SERVER, AdapterRecord, Entry, Move, Route
from nightschool_server.config.config import Config
from nightschool_server.engine import BASE, Engine
from nightschool_server.errors import (
    AdapterFormatError,
    FailedPreconditionError,
    UnknownAdapterError,
)
from nightschool_server.home import Home
from nightschool_server.store.store import Row, Store
from nightschool_server.uninterrupted import obtained, uninterrupted

__all__ = ["PROVEN", "AdapterRegistry", "AdapterView", "Lease", "RouteChange", "Source"]

log = logging.getLogger(__name__)


SWEEP_EVERY_S = 30.0
"""How often idle sessions end and the others are written."""


@dataclass(frozen=True)
class AdapterView:
    """All that an operator wants to know of an adapter."""

    record: AdapterRecord
    evaluation: Row | None
    """The latest row of `evaluations`."""
    events: list[Row]
    """Newest first: at, actor, action, reason, detail."""
    num_leases: int
    """Requests and sessions that hold it."""
    loaded: bool


@dataclass(frozen=True)
class RouteChange:
    """What a promotion or a rollback came to."""

    active: str
    previous: str
    at: float
    duration_s: float
    """From the call to the pointer's move, loading and proof included."""


class AdapterRegistry:
    """The adapters of one home on one engine. Call `start` first and `close` last."""

    def __init__(
        self, store: Store, home: Home, engine: Engine, config: Config, *, now: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._home = home
        self._engine = engine
        self._max_folder_bytes = config.adapters.max_folder_bytes
        self._now = now
        self._router = Router(store, config.sessions, now)
        self._loaded = LoadedAdapters(store, home, engine, config, self._router.is_held)
        self._changing = asyncio.Lock()
        self._importing = asyncio.Lock()
        self._sweeper: asyncio.Task[None] | None = None
        self._saved_at = float("-inf")

    @property
    def active(self) -> str:
        """The adapter that answers requests that are neither pinned nor of a session."""
        return self._router.current.active

    @property
    def previous(self) -> str:
        """Where a rollback goes."""
        return self._router.current.previous

    async def start(self) -> None:
        """Rebuild from the database: load and prove the active adapter, and the one to roll back to.

        Where the active one does not pass, the one before it takes its place, at last the base model, on the record.
        """
        await asyncio.to_thread(adapter_recovery.reconcile, self._store, self._home)
        self._router.current = adapter_rows.get_route(self._store)
        try:
            await self._loaded.ensure(self.active, may_exceed=True)
        except (AdapterFormatError, FailedPreconditionError, UnknownAdapterError) as error:
            log.error("event=active_adapter_failed adapter=%s error=%s", self.active, error)
            await self._go_back(time.monotonic(), SERVER, f"could not be served at start: {error}", action="fall_back")
        target = await self._servable_before(self.previous)
        if target != self.previous:
            await asyncio.to_thread(adapter_rows.set_previous, self._store, target)
            self._router.current = Route(self.active, target, self._router.current.changed_at)
        self._router.sessions.restore(adapter_rows.read_sessions(self._store, self._router.sessions.used_since))
        self._loaded.lane.follow(self.active)
        self._sweeper = asyncio.create_task(self._keep_sweeping(), name="registry_sweep")
        log.info("event=registry_started active=%s previous=%s", self.active, self.previous)

    async def close(self) -> None:
        """Write the sessions. Leases need no end: the requests that held them are gone."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await self.sweep()
        await self._loaded.lane.close()

    @asynccontextmanager
    async def route(
        self, session_id: str | None, pinned: str | None, caller: str = "", *, unproven: bool = False
    ) -> AsyncIterator[Lease]:
        """Hold the adapter of a request while it runs: the pinned one, else its session's, else the active one.

        An adapter that has not passed the gate is only pinned where `unproven` is allowed (the admin scope). Raises
        UnknownAdapterError, PermissionError_, FailedPreconditionError (quarantined), OverloadedError.
        """
        async with self._router.lease(self._loaded, session_id, pinned, caller, unproven=unproven) as lease:
            yield lease

    async def import_adapter(self, source: Source, parent: str, actor: str, reason: str) -> AdapterView:
        """Take a folder, or files by name, into the registry as a candidate, loaded and proven.

        The same content twice is the same adapter. Raises AdapterFormatError, UnknownAdapterError for the parent.
        """
        parent = parent or BASE
        if parent != BASE and adapter_rows.get_record(self._store, parent) is None:
            raise UnknownAdapterError(parent)
        stage = partial(adapter_folder.stage, self._home, source, self._max_folder_bytes)
        staged = await obtained(stage, adapter_folder.discard)
        try:
            async with self._importing:
                known = adapter_rows.find_by_digest(self._store, staged.digest)
                if known is not None and known.state != "quarantined":
                    return self._view(known)
                return await self._take_in(staged, parent, actor, reason)
        finally:
            await uninterrupted(asyncio.to_thread(adapter_folder.discard, staged))

    async def promote(self, name: str, actor: str, reason: str, *, force: bool = False) -> RouteChange:
        """Make `name` the active adapter: the next request gets it.

        Raises UnknownAdapterError, FailedPreconditionError where it has not passed the gate against the adapter that is
        active now (unless forced, on the record) or is quarantined, AdapterFormatError where it fails its proof. Then
        the incumbent stays.
        """
        began = time.monotonic()
        async with self._held_and_loaded(name), self._changing:
            if name == self.active:
                return self._change_since(began)
            evaluation = None if name == BASE else self._check_gate(name, force)
            detail = {"from": self.active, "forced": force, "evaluation": evaluation}
            return await self._move(
                Route(name, self.active, self._now()),
                [
                    Entry(actor, "retire", self.active, f"{name} took its place: {reason}"),
                    Entry(actor, "promote", name, reason, detail),
                ],
                began,
            )

    async def rollback(self, to: str | None, actor: str, reason: str) -> RouteChange:
        """Make an adapter that was active before the active one again; without `to` the one before the present one.

        Repeated rollbacks go further back, at last to the base model. Raises UnknownAdapterError,
        FailedPreconditionError where `to` was never active or there is nothing before, AdapterFormatError.
        """
        began = time.monotonic()
        if not to:
            if self.active == BASE and self.previous == BASE:
                raise FailedPreconditionError("the base model is active and nothing was before it: promote an adapter")
            return await self._go_back(began, actor, reason)
        async with self._held_and_loaded(to), self._changing:
            if to == self.active:
                return self._change_since(began)
            if to != BASE and adapter_rows.came_from(self._store, to) is None:
                raise FailedPreconditionError(f"adapter {to!r} was never active: promote it instead")
            return await self._move_back(to, actor, reason, "rollback", began)

    async def reject(self, name: str, actor: str, reason: str) -> AdapterView:
        """Mark a candidate that did not pass. Raises UnknownAdapterError, FailedPreconditionError for another state."""
        async with self._changing:
            record = self._record(name)
            if record.state not in ("candidate", "rejected"):
                raise FailedPreconditionError(f"adapter {name!r} is {record.state}; only a candidate can be rejected")
            if record.state == "candidate":
                entry = Entry(actor, "reject", name, reason)
                await asyncio.to_thread(adapter_rows.set_state, self._store, name, "rejected", entry)
        return self.get(name)

    async def delete(self, name: str, actor: str, reason: str = "") -> None:
        """Delete an adapter that nobody holds; its row and its audit trail stay.

        Raises UnknownAdapterError, FailedPreconditionError where it is active, next in line for a rollback, or held.
        """
        async with self._changing:
            self._record(name)
            if name in (self.active, self.previous):
                which = "active" if name == self.active else "where a rollback goes"
                raise FailedPreconditionError(f"adapter {name!r} is {which}: promote or roll back to another one first")
            if (num_leases := self._router.num_leases(name)) > 0:
                raise FailedPreconditionError(
                    f"adapter {name!r} is held by {num_leases} requests and sessions: try again when they have ended"
                )
            # Without an await since the count of leases: no request can take one in between.
            adapter_rows.delete_adapter(self._store, name, Entry(actor, "delete", name, reason))
            await self._loaded.unload(name)
            await asyncio.to_thread(adapter_folder.delete_folder, self._home, name)

    def get(self, name: str) -> AdapterView:
        """One adapter. Raises UnknownAdapterError."""
        return self._view(self._record(name))

    def list(self, *, state: str = "", before_sequence: int | None = None, limit: int = 100) -> list[AdapterView]:
        """Adapters, newest first; of one state where `state` is given, older than `before_sequence` for a next page."""
        records = adapter_rows.page_of_records(self._store, state=state, before_sequence=before_sequence, limit=limit)
        return [self._view(record) for record in records]

    def end_sessions_of(self, caller: str) -> None:
        """End a caller's sessions, whose requests are being erased."""
        self._router.sessions.end_all_of(caller)

    async def sweep(self) -> None:
        """End idle sessions, write those that were used, and unload what is over the limit."""
        self._router.sessions.expire()
        used_since, self._saved_at = self._saved_at, self._now()
        rows = self._router.sessions.rows(used_since)
        await asyncio.to_thread(adapter_rows.save_sessions, self._store, rows, self._router.sessions.used_since)
        await self._loaded.evict()

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self.sweep()
            except Exception:  # the boundary of a housekeeping round: the next one tries again
                log.exception("event=registry_sweep_failed")

    @asynccontextmanager
    async def _held_and_loaded(self, name: str) -> AsyncIterator[None]:
        """Around a change to `name`: the load and the proof, which take time, are outside the lock of changes."""
        self._router.leases.hold(name)
        try:
            await self._loaded.ensure(name, may_exceed=True)
            yield
        finally:
            self._router.leases.release(name)

    async def _take_in(self, staged: adapter_folder.Staged, parent: str, actor: str, reason: str) -> AdapterView:
        last = max([adapter_rows.last_sequence(self._store), *_sequences(self._home)])
        model = self._engine.model
        facts = {
            "base_model": model.name,
            "base_model_digest": model.digest,
            "chat_template_digest": model.chat_template_digest,
            "parent": parent,
            "cycle_id": staged.provenance.get("cycle_id"),
            "created_at": self._now(),
        }
        name = await uninterrupted(asyncio.to_thread(self._publish, staged, last + 1, facts, (actor, reason)))
        await self._loaded.ensure(name, may_exceed=True)
        return self.get(name)

    def _publish(
        self, staged: adapter_folder.Staged, sequence: int, facts: dict[str, object], why: tuple[str, str]
    ) -> str:
        folder = adapter_folder.publish(self._home, staged, sequence, facts)
        actor, reason = why
        adapter_rows.insert_adapter(self._store, folder, "candidate", Entry(actor, "import", folder.name, reason))
        return folder.name

    # Changes of the pointer. The callers hold `_changing`, but for `_go_back`, which takes it.

    def _check_gate(self, name: str, force: bool) -> str | None:
        """The evaluation that lets it pass, if one does. Raises FailedPreconditionError unless forced."""
        record = self._record(name)
        evaluation = adapter_rows.latest_comparison(self._store, name, self.active)
        passed = evaluation is not None and bool(evaluation["passed"]) and record.state != "rejected"
        if passed or force:
            return str(evaluation["id"]) if evaluation is not None else None
        if record.state == "rejected":
            why = "was rejected"
        elif evaluation is None:
            why = f"was not evaluated against {self.active!r}, which is active"
        else:
            reasons = "; ".join(json.loads(evaluation["reasons"]))
            why = f"did not pass the gate against {self.active!r} ({reasons})"
        raise FailedPreconditionError(f"adapter {name!r} {why}: evaluate it, or force the promotion, on the record")

    async def _go_back(self, began: float, actor: str, reason: str, action: str = "rollback") -> RouteChange:
        async with self._changing:
            return await self._move_back(await self._servable_before(self.previous), actor, reason, action, began)

    async def _servable_before(self, name: str) -> str:
        """`name`, or where it cannot be served what was active before it, and so on, at last the base model."""
        seen: set[str] = set()
        while name not in seen:
            seen.add(name)
            try:
                await self._loaded.ensure(name, may_exceed=True)
                return name
            except (AdapterFormatError, FailedPreconditionError, UnknownAdapterError) as error:
                log.warning("event=rollback_target_skipped adapter=%s error=%s", name, error)
                name = adapter_rows.before(self._store, name)
        return BASE

    async def _move_back(self, to: str, actor: str, reason: str, action: str, began: float) -> RouteChange:
        return await self._move(
            Route(to, adapter_rows.before(self._store, to), self._now()),
            [
                Entry(actor, "retire", self.active, f"{action} to {to}: {reason}"),
                Entry(actor, action, to, reason, {"from": self.active}),
            ],
            began,
        )

    async def _move(self, new: Route, entries: Sequence[Entry], began: float) -> RouteChange:
        await uninterrupted(self._commit(Move(self._router.current, new, entries, self._router.sessions.rows())))
        log.info("event=route_moved active=%s previous=%s", new.active, new.previous)
        return self._change_since(began)

    async def _commit(self, move: Move) -> None:
        # On the disk first: what a request is answered with, a restart finds.
        await asyncio.to_thread(adapter_rows.move_route, self._store, move)
        self._router.current = move.new
        self._loaded.lane.follow(move.new.active)

    def _change_since(self, began: float) -> RouteChange:
        route = self._router.current
        return RouteChange(route.active, route.previous, route.changed_at, time.monotonic() - began)

    # Reading.

    def _record(self, name: str) -> AdapterRecord:
        record = adapter_rows.get_record(self._store, name)
        if record is None:
            is_base = "'base' is the model without an adapter: see `nightschool status`" if name == BASE else ""
            raise UnknownAdapterError(name, is_base)
        return record

    def _view(self, record: AdapterRecord) -> AdapterView:
        return AdapterView(
            record=record,
            evaluation=adapter_rows.latest_evaluation(self._store, record.name),
            events=adapter_rows.events_of(self._store, record.name),
            num_leases=self._router.num_leases(record.name),
            loaded=record.name in self._loaded,
        )


def _sequences(home: Home) -> list[int]:
    """Of the folders, with or without a row."""
    names = adapter_folder.published_names(home)
    return [int(prefix) for name in names if (prefix := name.partition("-")[0]).isdigit()]
