"""Adapters in the engine: what is loaded, what is refused and how, and that nobody else notices."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from nightschool_server.engine import BASE, Engine
from nightschool_server.errors import (
    AdapterFormatError,
    AlreadyExistsError,
    FailedPreconditionError,
    UnknownAdapterError,
)
from safetensors.torch import load_file, save_file

from tests.server.engine_world import World, answer, request
from tests.server.tiny_models import make_adapter, make_qwen2

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("adapters")
    folder = make_qwen2(home / "model")
    patterns = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*o_proj": 3}, "alpha_pattern": {"v_proj": 32}}
    adapters = {
        "plain": make_adapter(folder, home / "plain", seed=1),
        "patterns": make_adapter(folder, home / "patterns", seed=2, **patterns),
        "every": make_adapter(folder, home / "every", seed=3, target_modules="all-linear", r=16, use_rslora=True),
    }
    return World(folder, adapters)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World) -> AsyncIterator[Engine]:
    async with world.engine() as running:
        yield running


async def test_rank_and_alpha_patterns_and_every_linear_equal_peft(world: World, engine: Engine) -> None:
    requests = [request("Name the fox.", name) for name in (BASE, *world.adapters)]
    found = await asyncio.gather(*(answer(engine, r) for r in requests))
    for asked, got in zip(requests, found, strict=True):
        assert got.token_ids == world.reference.greedy(asked.prompt, 24, asked.adapter)
    assert len({tuple(got.token_ids) for got in found}) == len(requests)


async def test_loading_and_unloading_leaves_running_answers_unchanged(world: World, engine: Engine) -> None:
    requests = [request("Count " * i, name, max_tokens=80, ignore_eos=True)
                for i, name in enumerate((BASE, "plain", BASE, "patterns"), start=1)]  # fmt: skip
    running = [asyncio.create_task(answer(engine, r)) for r in requests]
    for version in range(6):
        name = f"later-{version}"
        await engine.load_adapter(name, world.adapters["every"])
        got = await answer(engine, request("Hi", name, max_tokens=4))
        assert got.token_ids == world.reference.greedy(request("Hi").prompt, 4, "every")
        await engine.unload_adapter(name)
    for asked, got in zip(requests, await asyncio.gather(*running), strict=True):
        assert got.token_ids == world.reference.greedy(asked.prompt, 80, asked.adapter, ignore_eos=True)
    assert set(engine.stats().adapters) == set(world.adapters)


async def test_a_name_unloaded_and_loaded_anew_shares_nothing_with_the_old_version(
    world: World, engine: Engine
) -> None:
    asked = request("The same prompt for both versions of one name.", "again")
    for source in ("plain", "every"):
        await engine.load_adapter("again", world.adapters[source])
        got = await answer(engine, asked)
        assert got.token_ids == world.reference.greedy(asked.prompt, 24, source)
        assert got.num_cached_tokens == 0
        await engine.unload_adapter("again")


async def test_names_are_checked(world: World, engine: Engine) -> None:
    with pytest.raises(AlreadyExistsError, match="'plain' is already loaded"):
        await engine.load_adapter("plain", world.adapters["plain"])
    with pytest.raises(AlreadyExistsError):
        await engine.load_adapter(BASE, world.adapters["plain"])
    with pytest.raises(UnknownAdapterError, match="'nobody'"):
        await answer(engine, request("Hi", "nobody"))
    with pytest.raises(UnknownAdapterError):
        await engine.score(request("Hi").prompt, "ho", adapter="nobody")
    with pytest.raises(UnknownAdapterError):
        await engine.unload_adapter("nobody")
    with pytest.raises(FailedPreconditionError, match="base"):
        await engine.unload_adapter(BASE)


async def test_an_adapter_in_use_is_not_unloaded(world: World, engine: Engine) -> None:
    asked = request("Hi", "plain", max_tokens=400, ignore_eos=True)
    stream = engine.generate(asked)
    await anext(stream)
    with pytest.raises(FailedPreconditionError, match="in use"):
        await engine.unload_adapter("plain")
    assert len((await answer(engine, request("Hi", "plain"))).token_ids) > 0
    await stream.aclose()


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return edit


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def rename_target(tensors: dict[str, torch.Tensor]) -> None:
    for side in ("lora_A", "lora_B"):
        key = Q_A.replace("lora_A", side)
        tensors[key.replace("layers.0", "layers.9")] = tensors.pop(key)


def pickled(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (pickled, r"adapter_model\.bin is a pickle.*only safetensors are loaded"),
    "no config": (lambda f: (f / CONFIG).unlink(), r"adapter_config\.json is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"adapter_model\.safetensors is missing"),
    "no folder": (shutil.rmtree, r"is missing"),
    "config is no JSON": (lambda f: f.joinpath(CONFIG).write_text("{"), r"cannot be read as JSON"),
    "config is a list": (lambda f: f.joinpath(CONFIG).write_text("[]"), r"holds a JSON list"),
    "truncated": (
        lambda f: f.joinpath(WEIGHTS).write_bytes(f.joinpath(WEIGHTS).read_bytes()[:-100]),
        r"corrupt or truncated.*again",
    ),
    "garbage": (lambda f: f.joinpath(WEIGHTS).write_bytes(b"garbage" * 9), r"corrupt or truncated"),
    "dora": (edit_config(use_dora=True), r"use_dora is true.*use_dora=False"),
    "bias": (edit_config(bias="all"), r"bias is 'all'; only 'none'"),
    "modules_to_save": (edit_config(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
    "other method": (edit_config(peft_type="IA3"), r"peft_type is 'IA3'; only 'LORA'"),
    "changed base": (edit_config(init_lora_weights="pissa"), r"init_lora_weights is 'pissa'"),
    "unknown setting": (edit_config(fan_in_fan_out=True), r"fan_in_fan_out is True"),
    "invented setting": (edit_config(sparkle=3), r"sparkle is 3, which this engine does not apply: retrain without it"),
    "rank is text": (edit_config(r="four"), r"r is 'four'; it must be a number"),
    "other rank": (edit_config(r=8), r"has rank 4, adapter_config.json says 8"),
    "unknown tensor": (edit_weights(lambda t: t.update(x=torch.ones(1))), r"tensor 'x' is not lora_A"),
    "unknown module": (edit_weights(rename_target), r"'model\.layers\.9\.self_attn\.q_proj' is not a Linear"),
    "half a pair": (edit_weights(lambda t: t.pop(Q_A)), r"has lora_B alone"),
    "other shape": (edit_weights(lambda t: t.update({Q_A: torch.ones(4, 65)})), r"\[4, 65\].*needs \[rank, 64\]"),
    "not finite": (edit_weights(lambda t: t[Q_A].fill_(float("nan"))), r"not finite"),
    "no tensors": (edit_weights(lambda t: t.clear()), r"holds no tensors"),
}


@pytest.mark.parametrize("how", list(BROKEN))
async def test_a_broken_folder_is_refused_with_file_value_and_remedy(
    world: World, engine: Engine, tmp_path: Path, how: str
) -> None:
    damage, message = BROKEN[how]
    folder = shutil.copytree(world.adapters["plain"], tmp_path / "broken")
    damage(folder)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        await engine.load_adapter("broken", folder)
    assert str(folder) in str(caught.value)
    asked = request("Hi", "plain")
    assert (await answer(engine, asked)).token_ids == world.reference.greedy(asked.prompt, 24, "plain")


async def test_a_rank_above_the_limit_is_refused(world: World, tmp_path: Path) -> None:
    large = {rank: make_adapter(world.folder, tmp_path / f"rank-{rank}", seed=4, r=rank) for rank in (9, 10)}
    async with World(world.folder, {}).engine(max_lora_rank=9) as engine:
        await engine.load_adapter("fits", large[9])
        with pytest.raises(AdapterFormatError, match=r"rank 10; this engine's max_lora_rank is 9: raise engine\.max"):
            await engine.load_adapter("large", large[10])
