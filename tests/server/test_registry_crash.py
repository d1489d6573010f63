"""kill -9 and damage: the registry starts in the state that was acknowledged, or in the next one."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from nightschool_server.adapters import folder as adapter_folder
from nightschool_server.adapters.folder import MANIFEST_FILE
from nightschool_server.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from nightschool_server.config.config import Config
from nightschool_server.errors import AdapterFormatError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from tests.server.registry_world import World, world_at

REPOSITORY = Path(__file__).parents[2]


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_at(tmp_path) as made:
        yield made


def child(path: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.server.registry_child", str(path), mode]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", range(4))
async def test_an_acknowledged_change_of_the_pointer_survives_kill_9(tmp_path: Path, seed: int) -> None:
    with child(tmp_path, "flip") as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(random.Random(seed).randrange(1, 20))]
        process.send_signal(signal.SIGKILL)
        acknowledged += [line for line in process.stdout if line.endswith("\n")]
    store = Store.open(Home(tmp_path / "home"))
    moves = store.query("SELECT reason FROM events WHERE action IN ('promote', 'rollback')")
    assert len(moves) - len(acknowledged) in (0, 1), "at most one change was made and not yet acknowledged"
    world = World(tmp_path, store, Config())
    await world.start()
    if len(moves) == len(acknowledged):
        assert acknowledged[-1].split() == [world.registry.active, world.registry.previous]
    world.check()
    assert await world.served_by() == world.registry.active
    await world.registry.close()
    store.close()


async def test_an_import_cut_off_in_its_proof_is_there_and_unproven(tmp_path: Path) -> None:
    with child(tmp_path, "die_in_proof") as process:
        assert process.wait(60) == -signal.SIGKILL
    async with world_at(tmp_path) as world:
        (view,) = world.registry.list()
        assert (view.record.state, view.loaded) == ("candidate", False)
        assert await world.served_by(pin=view.record.name, unproven=True) == view.record.name
        again = await world.registry.import_adapter(tmp_path / "source", "", "cli", "")
        assert again.record.name == view.record.name


async def test_a_folder_whose_row_was_not_written_is_adopted(world: World) -> None:
    staged = adapter_folder.stage(world.store.home, world.folder(0.5), 10**6)
    folder = adapter_folder.publish(world.store.home, staged, 1, {"parent": "base", "created_at": 1.0})
    await world.restart(killed=True)
    assert world.actions(folder.name) == ["adopt"]
    assert world.state(folder.name) == "candidate"
    assert (await world.candidate(0.6)).startswith("0002-")


async def test_a_foreign_or_damaged_folder_is_left_alone_and_never_served(world: World) -> None:
    home = world.store.home
    name = await world.candidate(0.5)
    shutil.copytree(home.adapters / name, home.adapters / "0001-copied00")
    (home.adapters / "notes").mkdir()
    staged = adapter_folder.stage(home, world.folder(0.6), 10**6)
    damaged = adapter_folder.publish(home, staged, 5, {}).path
    (damaged / WEIGHTS_FILE).unlink()
    await world.restart(killed=True)
    assert [view.record.name for view in world.registry.list()] == [name]
    assert (home.adapters / "notes").is_dir()
    assert (await world.candidate(0.7)).startswith("0006-"), "a name is never used twice"


async def test_half_written_folders_are_swept(world: World) -> None:
    adapter_folder.stage(world.store.home, world.folder(0.5), 10**6)
    await world.restart(killed=True)
    assert list(world.store.home.adapters.iterdir()) == []


async def test_a_deletion_that_was_cut_off_is_finished(world: World) -> None:
    name = await world.candidate(0.5)
    kept = world.path / "kept"
    shutil.copytree(world.store.home.adapters / name, kept)
    await world.registry.delete(name, "cli")
    kept.rename(world.store.home.adapters / name)
    await world.restart(killed=True)
    assert world.registry.list() == []
    assert list(world.store.home.adapters.iterdir()) == []


def overwrite(path: Path, data: bytes = b"damaged") -> None:
    path.chmod(0o600)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "folder gone": shutil.rmtree,
    "weights gone": lambda folder: (folder / WEIGHTS_FILE).unlink(),
    "weights changed": lambda folder: overwrite(folder / WEIGHTS_FILE),
    "configuration changed": lambda folder: overwrite(folder / CONFIG_FILE, b"{}"),
    "manifest changed": lambda folder: overwrite(folder / MANIFEST_FILE, b"{}"),
    "manifest of another": lambda folder: shutil.copy(folder.parent / "other" / MANIFEST_FILE, folder / MANIFEST_FILE),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_active_adapter_makes_way_for_the_one_before(world: World, damage: str) -> None:
    first, second = await world.promoted(0.1), await world.promoted(0.2)
    shutil.copytree(world.store.home.adapters / first, world.store.home.adapters / "other")
    (world.store.home.adapters / second / MANIFEST_FILE).chmod(0o600)
    DAMAGES[damage](world.store.home.adapters / second)
    await world.restart(killed=True)
    assert await world.served_by() == first
    assert (world.state(first), world.state(second)) == ("active", "quarantined")
    assert world.registry.previous == "base"
    event = world.registry.get(first).events[0]
    assert (event["actor"], event["action"]) == ("server", "fall_back")
    world.check()


async def test_where_every_adapter_is_damaged_the_base_model_serves(world: World) -> None:
    names = [await world.promoted(effect) for effect in (0.1, 0.2)]
    for name in names:
        shutil.rmtree(world.store.home.adapters / name)
    await world.restart(killed=True)
    assert await world.served_by() == "base"
    assert [world.state(name) for name in names] == ["quarantined"] * 2
    assert world.registry.previous == "base"
    world.check()


async def test_a_rollback_skips_what_cannot_be_served(world: World) -> None:
    first, second, third = await world.promoted(0.1), await world.promoted(0.2), await world.promoted(0.3)
    await world.restart()
    await world.registry.rollback(second, "cli", "")
    overwrite(world.store.home.adapters / first / WEIGHTS_FILE)
    await world.registry.rollback(None, "cli", "")
    assert await world.served_by() == "base"
    assert world.state(first) == "quarantined"
    overwrite(world.store.home.adapters / third / WEIGHTS_FILE)
    await world.restart()
    with pytest.raises(AdapterFormatError, match="changed or damaged"):
        await world.registry.rollback(third, "cli", "")
    assert await world.served_by() == "base"
    world.check()
