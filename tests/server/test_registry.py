"""The registry: what may serve, how the pointer moves, and what stays when something is refused."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nightschool_server.errors import (
    AdapterFormatError,
    FailedPreconditionError,
    OverloadedError,
    PermissionError_,
    UnknownAdapterError,
)

from tests.server.fake_engine import make_adapter, recorded_probe
from tests.server.registry_world import World, world_at


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_at(tmp_path) as made:
        yield made


async def test_a_fresh_home_serves_the_base_model(world: World) -> None:
    assert (world.registry.active, world.registry.previous) == ("base", "base")
    assert await world.served_by() == await world.served_by("s1") == await world.served_by(pin="base") == "base"
    assert world.registry.list() == []


async def test_an_imported_adapter_is_a_proven_candidate(world: World) -> None:
    name = await world.candidate()
    view = world.registry.get(name)
    assert (view.record.state, view.record.parent, view.record.rank, view.loaded) == ("candidate", "base", 4, True)
    assert [(event["actor"], event["action"], event["reason"]) for event in view.events] == [("cli", "import", "test")]
    assert view.evaluation is None
    assert await world.served_by() == "base"


async def test_the_same_content_is_imported_once(world: World) -> None:
    source = world.folder()
    first = await world.registry.import_adapter(source, "", "cli", "")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert (await world.registry.import_adapter(files, "", "cli", "")).record.name == first.record.name
    assert len(world.registry.list()) == 1
    assert len(list(world.store.home.adapters.iterdir())) == 1


async def test_an_import_names_a_known_parent_and_cycle(world: World) -> None:
    parent = await world.candidate()
    with world.store.transaction() as db:
        db.execute(
            "INSERT INTO cycles (id, state, trigger, reason, created_at) VALUES ('c1', 'running', 'manual', '', 1)"
        )
    folder = world.folder(0.7, provenance={"cycle_id": "c1"})
    child = (await world.registry.import_adapter(folder, parent, "learner", "")).record
    assert (child.parent, child.cycle_id, child.sequence) == (parent, "c1", 2)
    with pytest.raises(UnknownAdapterError):
        await world.registry.import_adapter(world.folder(0.8), "0009-00000000", "cli", "")
    stranger = (
        await world.registry.import_adapter(world.folder(0.9, provenance={"cycle_id": "c9"}), "", "cli", "")
    ).record
    assert (stranger.cycle_id, stranger.manifest["cycle_id"]) == (None, "c9")


async def test_an_adapter_is_promoted_only_after_it_passed_against_the_present_incumbent(world: World) -> None:
    name = await world.candidate()
    with pytest.raises(FailedPreconditionError, match="not evaluated against 'base'"):
        await world.registry.promote(name, "learner", "")
    world.evaluate(name, "base", passed=False)
    with pytest.raises(FailedPreconditionError, match="gained too little"):
        await world.registry.promote(name, "learner", "")
    world.evaluate(name, "0007-else")
    with pytest.raises(FailedPreconditionError):
        await world.registry.promote(name, "learner", "")
    assert await world.served_by() == "base"
    world.clock.now += 1
    world.evaluate(name, "base")
    change = await world.registry.promote(name, "learner", "better")
    assert (change.active, change.previous) == (name, "base")
    assert change.duration_s >= 0
    assert await world.served_by() == name
    assert world.state(name) == "active"
    world.check()
    other = await world.candidate(0.6)
    world.evaluate(other, "base")
    with pytest.raises(FailedPreconditionError, match=f"not evaluated against '{name}'"):
        await world.registry.promote(other, "learner", "")


async def test_force_skips_the_gate_on_the_record(world: World) -> None:
    name = await world.candidate()
    await world.registry.reject(name, "learner", "no better")
    with pytest.raises(FailedPreconditionError, match="was rejected"):
        await world.registry.promote(name, "cli", "")
    await world.registry.promote(name, "cli", "I know better", force=True)
    assert await world.served_by() == name
    event = world.registry.get(name).events[0]
    assert (event["actor"], event["action"], event["reason"]) == ("cli", "promote", "I know better")
    assert '"forced":true' in event["detail"]


async def test_promoting_what_is_active_changes_nothing(world: World) -> None:
    name = await world.promoted()
    before = world.registry.get(name).events
    assert (await world.registry.promote(name, "cli", "again")).active == name
    assert world.registry.get(name).events == before


async def test_rollback_goes_back_step_by_step_and_never_forward(world: World) -> None:
    first, second = await world.promoted(0.1), await world.promoted(0.2)
    assert world.registry.previous == first
    for expected in (first, "base"):
        assert (await world.registry.rollback(None, "cli", "bad")).active == expected
        assert await world.served_by() == expected
        world.check()
    with pytest.raises(FailedPreconditionError, match="nothing was before"):
        await world.registry.rollback(None, "cli", "bad")
    assert [world.state(name) for name in (first, second)] == ["retired", "retired"]
    assert world.actions(first) == ["import", "promote", "retire", "rollback", "retire"]


async def test_rollback_goes_to_any_adapter_that_was_active(world: World) -> None:
    first, second, never = await world.promoted(0.1), await world.promoted(0.2), await world.candidate(0.3)
    await world.registry.rollback("base", "cli", "")
    assert (await world.registry.rollback(second, "cli", "")).previous == first
    assert (await world.registry.rollback(first, "cli", "")).previous == "base"
    with pytest.raises(FailedPreconditionError, match="never active"):
        await world.registry.rollback(never, "cli", "")
    with pytest.raises(UnknownAdapterError):
        await world.registry.rollback("0009-00000000", "cli", "")
    assert await world.served_by() == first
    world.check()


async def test_the_base_model_can_always_be_promoted(world: World) -> None:
    name = await world.promoted()
    assert (await world.registry.promote("base", "cli", "stop")).previous == name
    assert await world.served_by() == "base"
    assert (await world.registry.rollback(None, "cli", "")).active == name
    world.check()


async def test_a_rolled_back_adapter_is_promoted_again_on_its_evaluation(world: World) -> None:
    name = await world.promoted()
    await world.registry.rollback(None, "cli", "")
    await world.registry.promote(name, "cli", "")
    assert await world.served_by() == name


async def test_a_candidate_is_pinned_only_where_unproven_ones_are_allowed(world: World) -> None:
    name = await world.candidate()
    with pytest.raises(PermissionError_, match="has not passed the gate"):
        await world.served_by(pin=name)
    assert await world.served_by(pin=name, unproven=True) == name
    world.evaluate(name, "base")
    await world.registry.promote(name, "learner", "")
    await world.registry.rollback(None, "cli", "")
    assert await world.served_by(pin=name) == name, "it passed, so any caller may pin it"


@pytest.mark.parametrize("name", ["0009-00000000", "nonsense", "../etc"])
async def test_an_unknown_adapter_is_refused_by_everything(world: World, name: str) -> None:
    with pytest.raises(UnknownAdapterError, match="adapters list"):
        world.registry.get(name)
    for attempt in (
        world.served_by(pin=name),
        world.registry.promote(name, "cli", ""),
        world.registry.promote(name, "cli", "", force=True),
        world.registry.rollback(name, "cli", ""),
        world.registry.reject(name, "cli", ""),
        world.registry.delete(name, "cli"),
    ):
        with pytest.raises(UnknownAdapterError):
            await attempt


async def test_only_candidates_are_rejected(world: World) -> None:
    candidate, active = await world.candidate(0.1), await world.promoted(0.2)
    assert (await world.registry.reject(candidate, "learner", "worse")).record.state == "rejected"
    assert (await world.registry.reject(candidate, "learner", "worse")).events[0]["action"] == "reject"
    assert world.actions(candidate) == ["import", "reject"]
    with pytest.raises(FailedPreconditionError, match="is active"):
        await world.registry.reject(active, "learner", "")


async def test_an_adapter_in_use_is_not_deleted(world: World) -> None:
    first, second, third = await world.promoted(0.1), await world.promoted(0.2), await world.promoted(0.3)
    with pytest.raises(FailedPreconditionError, match="is active"):
        await world.registry.delete(third, "cli")
    with pytest.raises(FailedPreconditionError, match="where a rollback goes"):
        await world.registry.delete(second, "cli")
    async with world.route(pin=first):
        with pytest.raises(FailedPreconditionError, match="held by 1"):
            await world.registry.delete(first, "cli")
    await world.registry.delete(first, "cli", "old")
    with pytest.raises(UnknownAdapterError):
        world.registry.get(first)
    assert first not in world.engine.effects
    assert not (world.store.home.adapters / first).exists()
    assert world.store.one("SELECT reason FROM events WHERE action = 'delete'") == {"reason": "old"}
    assert (
        await world.registry.import_adapter(make_adapter(world.path / "again", 0.1), "", "cli", "")
    ).record.sequence == 4
    await world.registry.rollback(None, "cli", "")
    assert world.registry.previous == "base", "what was deleted is no way back"


# Proof of effect.


async def test_an_adapter_without_effect_is_quarantined_and_never_serves(world: World) -> None:
    with pytest.raises(AdapterFormatError, match="no effect"):
        await world.candidate(0.0)
    (view,) = world.registry.list()
    name = view.record.name
    assert (view.record.state, view.loaded) == ("quarantined", False)
    assert "no effect" in view.events[0]["reason"]
    for attempt in (
        world.served_by(pin=name, unproven=True),
        world.registry.promote(name, "cli", "", force=True),
        world.registry.rollback(name, "cli", ""),
    ):
        with pytest.raises(FailedPreconditionError, match="quarantined"):
            await attempt
    await world.registry.delete(name, "cli")


async def test_an_adapter_must_do_what_its_trainer_saw(world: World) -> None:
    good = await world.candidate(0.5, provenance={"probe": recorded_probe(0.5)})
    assert world.registry.get(good).loaded
    for effect, probe, why in (
        (0.6, recorded_probe(0.2), "off what the trainer recorded"),
        (0.7, recorded_probe(0.7) | {"logprobs": [[-1.7]]}, "another tokenizer"),
        (0.8, {"prompts": [{}], "logprobs": [[]]}, "cannot be read"),
        (0.9, {"prompts": [], "logprobs": [[0.0]]}, "cannot be read"),
    ):
        with pytest.raises(AdapterFormatError, match=why):
            await world.candidate(effect, provenance={"probe": probe})
    assert len(world.registry.list(state="quarantined")) == 4


async def test_an_adapter_that_the_engine_cannot_serve_is_refused(world: World) -> None:
    with pytest.raises(AdapterFormatError, match="rank 65"):
        await world.candidate(0.5, rank=65)
    assert await world.served_by() == "base"


async def test_a_file_that_is_no_adapter_leaves_no_row(world: World) -> None:
    source = world.folder()
    (source / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterFormatError, match="safetensors"):
        await world.registry.import_adapter(source, "", "cli", "")
    assert world.registry.list() == []
    assert list(world.store.home.adapters.iterdir()) == []


# What is loaded.


async def test_at_most_so_many_adapters_are_loaded_and_the_idle_ones_leave(tmp_path: Path) -> None:
    async with world_at(tmp_path, "adapters.max_loaded=3") as world:
        names = [await world.candidate(0.1 * number) for number in range(1, 6)]
        assert list(world.engine.effects) == names[-3:]
        assert await world.served_by(pin=names[2], unproven=True) == names[2]
        assert await world.served_by(pin=names[0], unproven=True) == names[0]
        assert set(world.engine.effects) == {names[2], names[4], names[0]}, "the least recently used one left"


async def test_an_adapter_that_is_held_is_never_unloaded(tmp_path: Path) -> None:
    async with world_at(tmp_path, "adapters.max_loaded=2") as world:
        first, second, third = [await world.candidate(0.1 * number) for number in (1, 2, 3)]
        async with world.route(pin=first, unproven=True), world.route(pin=second, unproven=True):
            with pytest.raises(OverloadedError, match=r"adapters\.max_loaded"):
                await world.served_by(pin=third, unproven=True)
            # A change of the pointer may exceed the limit: it must not depend on traffic.
            await world.registry.promote(third, "cli", "", force=True)
            assert set(world.engine.effects) == {first, second, third}
            assert await world.served_by() == third
        await world.registry.sweep()
        assert len(world.engine.effects) == 2
        assert third in world.engine.effects


# Listing.


async def test_adapters_are_listed_newest_first_by_page_and_state(world: World) -> None:
    names = [await world.candidate(0.1 * number) for number in range(1, 5)]
    await world.registry.reject(names[1], "cli", "")
    page = world.registry.list(limit=3)
    assert [view.record.name for view in page] == names[:0:-1]
    rest = world.registry.list(limit=3, before_sequence=page[-1].record.sequence)
    assert [view.record.name for view in rest] == names[:1]
    assert [view.record.name for view in world.registry.list(state="rejected")] == [names[1]]
    world.evaluate(names[0], "base", passed=False)
    world.clock.now += 1
    world.evaluate(names[0], "base")
    evaluation = world.registry.get(names[0]).evaluation
    assert evaluation is not None
    assert evaluation["passed"] == 1


# Any order of operations.


@pytest.mark.parametrize("seed", range(6))
async def test_any_order_of_operations_keeps_one_active_adapter_and_what_is_held(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with world_at(tmp_path, "adapters.max_loaded=3") as world:
        names: list[str] = ["base"]

        async def act() -> None:
            name = chance.choice(names)
            match chance.randrange(9):
                case 0 | 1:
                    names.append(await world.candidate(round(chance.uniform(0.1, 9), 6)))
                case 2:
                    world.clock.now += 1
                    world.evaluate(name, world.registry.active, passed=chance.random() < 0.7)
                    await world.registry.promote(name, "cli", "", force=chance.random() < 0.2)
                case 3:
                    await world.registry.rollback(chance.choice([None, name]), "cli", "")
                case 4:
                    await world.registry.reject(name, "cli", "")
                case 5:
                    await world.registry.delete(name, "cli")
                case 6:
                    await world.served_by(chance.choice(["s1", "s2"]))
                case 7:
                    await world.served_by(pin=name, unproven=True)
                case _:
                    world.clock.now += chance.choice([1, 2000])
                    await world.restart(killed=chance.random() < 0.5)

        for _ in range(60):
            held = chance.choice([None, world.registry.active])
            async with world.route(pin=held):
                with contextlib.suppress(FailedPreconditionError, UnknownAdapterError, OverloadedError):
                    await act()
                world.check()
