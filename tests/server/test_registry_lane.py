"""The merged lane follows the active pointer, in the background, and is a matter of speed alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nightschool_server.engine import BASE

from tests.server.fake_engine import FakeEngine
from tests.server.registry_world import World, world_at


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_at(tmp_path, "adapters.max_loaded=2") as made:
        yield made


async def settled(world: World) -> str:
    """What is merged once the lane stands still."""
    await world.registry._loaded.lane.settle()
    return world.engine.merged


def lanes() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "adapter_lane"]


async def test_the_lane_follows_promotion_rollback_and_restart(world: World) -> None:
    assert await settled(world) == BASE
    first = await world.promoted(0.1)
    assert await settled(world) == first
    second = await world.promoted(0.2)
    assert await settled(world) == second
    await world.registry.rollback(None, "cli", "worse")
    assert await settled(world) == first
    await world.restart()
    assert await settled(world) == first
    await world.registry.rollback(None, "cli", "worse still")
    assert await settled(world) == BASE


async def test_a_promotion_does_not_wait_for_the_lane_and_of_several_the_last_counts(world: World) -> None:
    await settled(world)
    world.engine.merges.clear()
    world.engine.merge_gate.clear()
    names = [await world.promoted(0.1 * number) for number in (1, 2, 3)]
    assert world.registry.active == names[-1]
    assert world.engine.merged == BASE
    world.engine.merge_gate.set()
    assert await settled(world) == names[-1]
    assert world.engine.merges == [names[0], names[-1]]


async def test_where_a_merge_fails_serving_goes_on_and_the_next_promotion_tries_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    first = await world.candidate(0.1)
    world.engine.unmergeable.add(first)
    await world.registry.promote(first, "cli", "", force=True)
    assert await settled(world) == BASE
    assert await world.served_by() == first
    assert f"event=lane_failed adapter={first}" in caplog.text
    second = await world.promoted(0.2)
    assert await settled(world) == second


async def test_a_merged_adapter_that_has_to_leave_the_engine_is_unmerged_first(world: World) -> None:
    first = await world.promoted(0.1)
    assert await settled(world) == first
    later = [await world.candidate(0.1 * number) for number in (2, 3)]
    world.engine.unmergeable.update(later)
    for name in later:
        await world.registry.promote(name, "cli", "", force=True)
    assert await settled(world) == first
    await world.registry.sweep()
    assert world.engine.merged == BASE
    assert set(world.engine.effects) == set(later)


async def test_an_eviction_waits_for_a_lane_that_is_about_to_move(world: World) -> None:
    first = await world.promoted(0.1)
    assert await settled(world) == first
    world.engine.merge_gate.clear()
    for number in (2, 3):
        await world.promoted(0.1 * number)
    # The fake, as every engine, refuses to unload what is merged: a sweep that did not wait would fail.
    leaving = asyncio.create_task(world.registry.sweep())
    await world.served_by()
    world.engine.merge_gate.set()
    await leaving
    assert first not in world.engine.effects
    assert await settled(world) == world.registry.active


async def test_a_lane_that_is_switched_off_is_never_asked(tmp_path: Path) -> None:
    async with world_at(tmp_path, "engine.merged_lane=false") as world:
        await world.promoted(0.1)
        assert await settled(world) == BASE
        assert world.engine.merges == []


async def test_closing_ends_a_move_that_is_under_way(world: World) -> None:
    await world.promoted(0.1)
    await settled(world)
    world.engine.merging.clear()
    world.engine.merge_gate.clear()
    await world.promoted(0.2)
    await world.engine.merging.wait()
    assert len(lanes()) == 1
    await world.restart(engine=FakeEngine())
    await settled(world)
    assert lanes() == []
