"""A registry on a real store with the fake engine, and what tests do to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nightschool_server.adapters.leases import Lease
from nightschool_server.adapters.registry import AdapterRegistry
from nightschool_server.config.config import Config, apply_overrides
from nightschool_server.home import Home
from nightschool_server.ids import new_id
from nightschool_server.store.store import Store

from tests.server.fake_engine import FakeEngine, make_adapter


@dataclass
class Clock:
    """Time that a test moves."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """One home; the registry on it may be started again and again."""

    path: Path
    store: Store
    config: Config
    engine: FakeEngine = field(default_factory=FakeEngine)
    clock: Clock = field(default_factory=Clock)
    registry: AdapterRegistry = field(init=False)
    num_made: int = 0

    async def start(self) -> AdapterRegistry:
        self.registry = AdapterRegistry(self.store, self.store.home, self.engine, self.config, now=self.clock)
        await self.registry.start()
        return self.registry

    async def restart(self, *, killed: bool = False, engine: FakeEngine | None = None) -> AdapterRegistry:
        """As a new process would; `killed` leaves out the orderly end."""
        if killed:
            await self.stop_housekeeping()
        else:
            await self.registry.close()
        self.engine = engine or FakeEngine()
        return await self.start()

    async def stop_housekeeping(self) -> None:
        """End the task of the registry without writing anything."""
        sweeper = self.registry._sweeper
        if sweeper is not None:
            sweeper.cancel()
            await asyncio.gather(sweeper, return_exceptions=True)

    def folder(self, effect: float = 0.5, **changes: Any) -> Path:
        self.num_made += 1
        return make_adapter(self.path / f"source-{self.num_made}", effect, **changes)

    async def candidate(self, effect: float = 0.5, **changes: Any) -> str:
        """A new adapter in the registry."""
        view = await self.registry.import_adapter(self.folder(effect, **changes), "base", "cli", "test")
        return view.record.name

    def evaluate(self, candidate: str, incumbent: str, *, passed: bool = True) -> None:
        """What the learner writes after its evaluation."""
        with self.store.transaction() as db:
            db.execute(
                "INSERT INTO evaluations (id, cycle_id, candidate, incumbent, set_digest, n, incumbent_success, "
                "candidate_success, interval_low, interval_high, interval_level, num_gained, num_lost, p_value, "
                "passed, reasons, families, created_at) "
                "VALUES (?, NULL, ?, ?, 's', 400, 0.6, 0.9, 0.2, 0.4, 0.95, 9, 1, 0.01, ?, ?, '[]', ?)",
                (new_id("eval"), candidate, incumbent, passed, '["gained too little"]', self.clock()),
            )

    async def promoted(self, effect: float = 0.5) -> str:
        """A new adapter that passed the gate and is active."""
        name = await self.candidate(effect)
        self.evaluate(name, self.registry.active)
        await self.registry.promote(name, "learner", "better")
        return name

    def route(
        self, session: str | None = None, pin: str | None = None, **more: Any
    ) -> AbstractAsyncContextManager[Lease]:
        return self.registry.route(session, pin, more.pop("caller", "alice"), **more)

    async def served_by(self, session: str | None = None, pin: str | None = None, **more: Any) -> str:
        """The adapter of one request, which the engine has loaded."""
        async with self.route(session, pin, **more) as lease:
            assert lease.adapter == "base" or lease.adapter in self.engine.effects
            return lease.adapter

    def state(self, name: str) -> str:
        return self.registry.get(name).record.state

    def actions(self, name: str) -> list[str]:
        """The audit trail, oldest first."""
        return [event["action"] for event in reversed(self.registry.get(name).events)]

    def check(self) -> None:
        """What must hold at any time: one active adapter, the same in memory, in the route and in the states."""
        route = self.store.one("SELECT active, previous FROM routes")
        assert route == {"active": self.registry.active, "previous": self.registry.previous}
        active = [row["name"] for row in self.store.query("SELECT name FROM adapters WHERE state = 'active'")]
        assert active == ([] if self.registry.active == "base" else [self.registry.active])
        assert self.registry.active == "base" or self.registry.active in self.engine.effects
        assert self.registry.previous == "base" or self.state(self.registry.previous) != "quarantined"


@asynccontextmanager
async def world_at(path: Path, *overrides: str) -> AsyncIterator[World]:
    """A started registry on a fresh home."""
    store = Store.open(Home(path / "home"))
    world = World(path, store, apply_overrides(Config(), overrides))
    await world.start()
    try:
        yield world
    finally:
        await world.registry.close()
        store.close()
