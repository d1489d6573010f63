"""Leases and sessions: a request and a session keep the adapter they began with, whatever changes meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from nightschool_server.adapters.format import WEIGHTS_FILE
from nightschool_server.errors import AdapterFormatError, FailedPreconditionError

from tests.server.fake_engine import FakeEngine
from tests.server.registry_world import World, world_at

IDLE_S = 100


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_at(tmp_path, f"sessions.idle_timeout_s={IDLE_S}", "adapters.max_loaded=2") as made:
        yield made


async def test_a_request_ends_on_the_adapter_it_began_with(world: World) -> None:
    first = await world.promoted(0.1)
    async with world.route() as lease:
        second = await world.promoted(0.2)
        await world.registry.rollback("base", "cli", "")
        third = await world.promoted(0.3)
        assert lease.adapter == first
        assert first in world.engine.effects
        assert world.registry.get(first).num_leases == 1
        assert await world.served_by() == third
    assert world.registry.get(first).num_leases == 0
    assert world.registry.get(second).num_leases == 0


async def test_a_session_keeps_its_adapter_until_it_idles_out(world: World) -> None:
    first = await world.promoted(0.1)
    assert await world.served_by("s1") == first
    second = await world.promoted(0.2)
    for _ in range(3):
        world.clock.now += IDLE_S - 1
        assert await world.served_by("s1") == first
    assert await world.served_by("s2") == second
    assert world.registry.get(first).num_leases == 1
    world.clock.now += IDLE_S + 1
    assert await world.served_by("s1") == second
    assert world.registry.get(first).num_leases == 0


async def test_sessions_of_two_callers_are_apart_although_they_share_a_name(world: World) -> None:
    first = await world.promoted(0.1)
    await world.served_by("chat", caller="alice")
    second = await world.promoted(0.2)
    assert await world.served_by("chat", caller="bob") == second
    assert await world.served_by("chat", caller="alice") == first
    world.registry.end_sessions_of("alice")
    assert await world.served_by("chat", caller="alice") == second


async def test_a_pin_does_not_change_its_session(world: World) -> None:
    first = await world.promoted(0.1)
    assert await world.served_by("s1", pin="base") == "base"
    assert await world.served_by("s1") == first
    await world.promoted(0.2)
    assert await world.served_by("s1", pin="base") == "base"
    assert await world.served_by("s1") == first


async def test_the_oldest_session_ends_where_there_are_too_many(tmp_path: Path) -> None:
    async with world_at(tmp_path, "sessions.max_sessions=2") as world:
        first = await world.promoted(0.1)
        for session in ("s1", "s2", "s1", "s3"):
            await world.served_by(session)
        second = await world.promoted(0.2)
        assert [await world.served_by(session) for session in ("s1", "s3", "s2")] == [first, first, second]


@pytest.mark.parametrize("killed", [False, True])
async def test_sessions_that_stayed_behind_survive_a_restart(world: World, killed: bool) -> None:
    first = await world.promoted(0.1)
    await world.served_by("s1")
    second = await world.promoted(0.2)
    await world.served_by("s2")
    await world.restart(killed=killed)
    assert await world.served_by("s1") == first
    assert await world.served_by("s2") == second
    assert await world.served_by() == second
    world.clock.now += IDLE_S + 1
    await world.restart(killed=killed)
    assert await world.served_by("s1") == second


async def test_a_session_whose_adapter_was_damaged_goes_on_with_the_active_one(world: World) -> None:
    first = await world.promoted(0.1)
    await world.served_by("s1")
    second = await world.promoted(0.2)
    await world.promoted(0.3)
    await world.restart()
    assert first not in world.engine.effects
    weights = world.store.home.adapters / first / WEIGHTS_FILE
    weights.chmod(0o600)
    weights.write_bytes(b"damaged")
    assert await world.served_by("s1") == world.registry.active != second
    assert world.state(first) == "quarantined"
    assert world.registry.get(first).num_leases == 0


async def test_requests_flow_while_an_adapter_is_being_promoted(world: World) -> None:
    name = await world.candidate(0.1)
    world.evaluate(name, "base")
    await world.restart()
    assert name not in world.engine.effects
    world.engine.gate.clear()
    promotion = asyncio.create_task(world.registry.promote(name, "learner", ""))
    await asyncio.wait_for(world.engine.loading.wait(), 60)
    assert await world.served_by() == "base"
    world.engine.gate.set()
    assert (await promotion).active == name
    assert await world.served_by() == name


async def test_many_requests_for_an_adapter_load_it_once(world: World) -> None:
    name = await world.candidate(0.1)
    await world.restart()
    world.engine.gate.clear()
    asked = [asyncio.create_task(world.served_by(pin=name, unproven=True)) for _ in range(5)]
    await asyncio.wait_for(world.engine.loading.wait(), 60)
    asked[0].cancel()
    await asyncio.gather(asked[0], return_exceptions=True)
    world.engine.gate.set()
    assert await asyncio.gather(*asked[1:]) == [name] * 4
    assert world.engine.loads == [name]
    assert world.registry.get(name).num_leases == 0


async def test_a_cancelled_promotion_is_whole_or_not_at_all(world: World) -> None:
    name = await world.candidate(0.1)
    world.evaluate(name, "base")
    promotion = asyncio.create_task(world.registry.promote(name, "learner", ""))
    await asyncio.sleep(0)
    promotion.cancel()
    await asyncio.gather(promotion, return_exceptions=True)
    world.check()
    assert (await world.registry.promote(name, "learner", "")).active == name
    world.check()


async def test_promotions_and_rollbacks_at_once_happen_one_after_the_other(world: World) -> None:
    names = [await world.candidate(effect) for effect in (0.1, 0.2)]
    changes = await asyncio.gather(
        world.registry.promote(names[0], "a", "", force=True),
        world.registry.promote(names[1], "b", "", force=True),
        world.registry.rollback(None, "c", ""),
        return_exceptions=True,
    )
    world.check()
    assert all(not isinstance(change, BaseException) for change in changes[:2])
    assert isinstance(changes[2], FailedPreconditionError) or world.registry.active in ("base", names[0])
    moves = world.store.query("SELECT subject, detail FROM events WHERE action IN ('promote', 'rollback') ORDER BY id")
    came_from = ["base", *(row["subject"] for row in moves)]
    for number, row in enumerate(moves):
        assert f'"from":"{came_from[number]}"' in row["detail"], "each change began where the last one ended"


async def test_a_failed_promotion_leaves_the_incumbent(world: World) -> None:
    first, second = await world.promoted(0.1), await world.candidate(0.2)
    await world.restart()
    weights = world.store.home.adapters / second / WEIGHTS_FILE
    weights.chmod(0o600)
    weights.write_bytes(b"damaged")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(world.route("s1"))
        with pytest.raises(AdapterFormatError, match="changed or damaged"):
            await world.registry.promote(second, "cli", "", force=True)
    assert await world.served_by() == first
    assert world.state(second) == "quarantined"
    world.check()


async def test_an_adapter_of_another_base_model_is_not_served(world: World) -> None:
    name = await world.promoted(0.1)
    await world.restart(engine=FakeEngine(base_digest="d" * 64))
    assert await world.served_by() == "base"
    assert world.state(name) == "retired", "it is whole: with its base model it may be promoted again"
    with pytest.raises(FailedPreconditionError, match="serve that model, or train again"):
        await world.registry.promote(name, "cli", "", force=True)
    with pytest.raises(FailedPreconditionError, match="cannot serve"):
        await world.served_by(pin=name)
    await world.restart()
    await world.registry.promote(name, "cli", "")
    assert await world.served_by() == name
