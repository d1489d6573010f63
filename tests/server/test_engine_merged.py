"""The merged lane of the engine: whatever is merged, every answer is the one that transformers gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from nightschool_server.chat import user
from nightschool_server.config.serving import EngineConfig
from nightschool_server.engine import BASE, GenerateRequest, Prompt
from nightschool_server.engine_factory import start_engine
from nightschool_server.engines.lora import AdapterTable
from nightschool_server.engines.lora_files import AdapterWeights
from nightschool_server.engines.merging import merged_weights
from nightschool_server.engines.transformers_engine import TransformersEngine
from nightschool_server.errors import EngineDeadError, FailedPreconditionError, UnknownAdapterError
from torch import nn

from tests.server.engine_world import Answer, World, answers, pictures, prompt_with, request
from tests.server.tiny_models import make_adapter, make_idefics3, make_qwen2

TOLERANCE_NATS = 1e-4
"""Of a token's logprob in float32, merged against not: what rounding in another order comes to."""

OTHER_TARGETS = r".*(text_model|language_model|model)\.layers.*(q_proj|k_proj|gate_proj)"
"""Partly those of `make_adapter`'s own."""

MAKERS: dict[str, Callable[[Path], Path]] = {"qwen2": make_qwen2, "idefics3": make_idefics3}

Reference = Callable[[GenerateRequest], list[int]]


@pytest.fixture(scope="module", params=list(MAKERS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp(request.param)
    folder = MAKERS[request.param](home / "model")
    first = make_adapter(folder, home / "first", seed=1)
    second = make_adapter(folder, home / "second", seed=2, r=16, lora_alpha=8, target_modules=OTHER_TARGETS)
    return World(folder, {"first": first, "second": second})


@pytest.fixture(scope="module")
def reference(world: World) -> Reference:
    @cache
    def greedy(text: str, adapter: str, with_image: bool, max_tokens: int) -> list[int]:
        prompt = prompt_with(text, *pictures(1)) if with_image else Prompt((user(text),))
        return world.reference.greedy(prompt, max_tokens, adapter, ignore_eos=True)

    def of(asked: GenerateRequest) -> list[int]:
        message = asked.prompt.messages[0]
        return greedy(message.text, asked.adapter, bool(asked.prompt.images), asked.sampling.max_tokens)

    return of


def mixed(world: World, often: str) -> list[GenerateRequest]:
    """Text and images on the base and both adapters, most of the answers on `often`; long enough to be seen running."""
    asked = [
        request(text, name, n=6 if name == often else 1, max_tokens=32, ignore_eos=True)
        for text in ("Hi", "What is the price of seven red apples?", "fox " * 40)
        for name in (BASE, "first", "second")
    ]
    if world.reference.sees:
        seen = prompt_with("How many?", *pictures(1))
        asked += [request(seen, name, max_tokens=32, ignore_eos=True) for name in (BASE, "first", "second")]
    return asked


def num_corrected(engine: TransformersEngine) -> int | None:
    """How many tokens of the last step were corrected; None where it ran on the base weights."""
    return engine._runner.adapters.routes.num_unmerged


async def test_all_answers_equal_the_reference_whatever_is_merged(world: World, reference: Reference) -> None:
    async with world.engine() as engine:
        for merged in (BASE, "first", "second", "first", BASE, "second", BASE):
            await engine.merge_adapter(merged)
            assert engine.stats().merged == merged
            corrected: set[int | None] = set()

            async def ask(asked: GenerateRequest, corrected: set[int | None] = corrected) -> list[Answer]:
                found = [Answer() for _ in range(asked.sampling.n)]
                async for delta in engine.generate(asked):
                    found[delta.index].add(delta)
                    corrected.add(num_corrected(engine))
                return found

            requests = mixed(world, often=merged)
            for asked, found in zip(requests, await asyncio.gather(*map(ask, requests)), strict=True):
                for got in found:
                    assert got.token_ids == reference(asked), f"{asked.adapter} while {merged} is merged"
            # The mixed batch did run on the merged weights, with others in it.
            assert (max(corrected, key=lambda n: n or 0) or 0) > 0 if merged != BASE else corrected == {None}


async def test_logprobs_stay_as_they_are_while_the_lane_moves_under_running_requests(world: World) -> None:
    requests = [
        request("Count " * i, name, n=5 if name == "first" else 2, max_tokens=120, ignore_eos=True, logprobs=True)
        for i, name in enumerate((BASE, "first", "second"), start=1)
    ]
    async with world.engine(merged_lane=False) as engine:
        expected = await asyncio.gather(*(answers(engine, asked) for asked in requests))
    async with world.engine() as engine:
        num_moves = 0
        # Once, where the machine moves the lane as fast as it answers.
        while num_moves <= 5:
            running = asyncio.gather(*(answers(engine, asked) for asked in requests))
            while not running.done():
                await engine.merge_adapter(("first", "second", BASE)[num_moves % 3])
                # As many deltas pass between two moves as an answer of two tokens takes.
                await answers(engine, request("Hi", max_tokens=2, ignore_eos=True))
                num_moves += 1
            for before, after in zip(expected, await running, strict=True):
                for one, other in zip(before, after, strict=True):
                    assert other.token_ids == one.token_ids
                    assert other.logprobs == pytest.approx(one.logprobs, abs=TOLERANCE_NATS)


async def test_scores_are_the_same_merged_and_not(world: World) -> None:
    prompt = prompt_with("How many?", *pictures(1)) if world.reference.sees else Prompt((user("How many?"),))
    async with world.engine() as engine:
        scores: dict[str, list[list[float]]] = {}
        for merged in (BASE, "first", "second", BASE):
            await engine.merge_adapter(merged)
            asked = [*([merged] * 8), BASE, "first", "second"]
            found = await asyncio.gather(*(engine.score(prompt, "Three apples are left.", adapter=n) for n in asked))
            for name, got in zip(asked, found, strict=True):
                scores.setdefault(name, []).append(list(got.logprobs))
        for name, rows in scores.items():
            tokens = world.reference.tokenizer("Three apples are left.", add_special_tokens=False)["input_ids"]
            logprobs = world.reference.logprobs(prompt, tokens, name)
            exact = [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]
            for row in rows:
                assert row == pytest.approx(exact, abs=TOLERANCE_NATS)


async def test_twenty_moves_leave_no_drift_and_one_copy(world: World) -> None:
    async with world.engine() as engine:
        linears = [m for m in engine._loaded.parts.model.modules() if hasattr(m, "merged")]
        pristine = [linear.base.weight.clone() for linear in linears]
        await engine.merge_adapter("first")
        fresh = [linear.merged.weight.clone() for linear in linears if linear.merged is not None]
        num_second = len(engine._runner.adapters.pairs(engine._serials["second"]))
        assert 0 < num_second < len(fresh) < len(linears)
        for move in range(20):
            await engine.merge_adapter(("second", "first")[move % 2])
            # What only the other adapter names holds no copy.
            assert sum(linear.merged is not None for linear in linears) == (len(fresh) if move % 2 else num_second)
        again = [linear.merged.weight for linear in linears if linear.merged is not None]
        assert all(torch.equal(one, other) for one, other in zip(fresh, again, strict=True))
        await engine.merge_adapter(BASE)
        assert all(linear.merged is None for linear in linears)
        assert all(torch.equal(linear.base.weight, w) for linear, w in zip(linears, pristine, strict=True))


async def test_a_merged_weight_in_bfloat16_is_rounded_once(world: World) -> None:
    asked = request("Hi", "first", n=4, ignore_eos=True)
    async with world.engine(dtype="bfloat16") as engine:
        await engine.merge_adapter("first")
        for linear, (a, b) in engine._runner.adapters.pairs(engine._serials["first"]):
            assert linear.merged is not None
            exact = linear.base.weight.double() + (a.double() @ b.double()).T
            error = (linear.merged.weight.double() - exact).abs()
            # Half a unit in the last of bfloat16's eight bits, and float32's own error in the sum.
            assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())
        assert len((await answers(engine, asked))[0].token_ids) == 24
        assert num_corrected(engine) == 0


async def test_moves_that_come_at_once_end_on_the_last(world: World) -> None:
    async with world.engine() as engine:
        await asyncio.gather(*(engine.merge_adapter(name) for name in ("first", "second", BASE, "first", "second")))
        assert engine.stats().merged == "second"


async def test_the_merged_adapter_is_not_unloaded_and_unknown_names_are_refused(world: World) -> None:
    async with world.engine() as engine:
        await engine.merge_adapter("first")
        with pytest.raises(FailedPreconditionError, match="'first' is merged into the weights: merge another one"):
            await engine.unload_adapter("first")
        with pytest.raises(UnknownAdapterError, match="'nobody'"):
            await engine.merge_adapter("nobody")
        assert engine.stats().merged == "first"
        await engine.merge_adapter("second")
        await engine.unload_adapter("first")
        with pytest.raises(UnknownAdapterError, match="'first'"):
            await engine.merge_adapter("first")
        assert engine.stats().merged == "second"
    with pytest.raises(EngineDeadError):
        await engine.merge_adapter(BASE)


async def test_an_adapter_that_is_unloaded_while_it_is_being_merged_is_not_merged(world: World) -> None:
    async with world.engine() as engine:
        await engine.merge_adapter("second")
        held = threading.Event()
        for _ in range(2):
            engine._pool.submit(held.wait)
        moving = asyncio.create_task(engine.merge_adapter("first"))
        await asyncio.sleep(0)
        # After the move's first command, which is in front of this one, its weights wait for a thread of the pool.
        await engine._loop.call(lambda: None)
        assert engine.stats().merged == BASE
        await engine.unload_adapter("first")
        held.set()
        with pytest.raises(UnknownAdapterError, match="'first'"):
            await moving
        assert engine.stats().merged == BASE
        await engine.merge_adapter("second")


async def test_a_lane_that_is_switched_off_merges_nothing(world: World) -> None:
    engine = await start_engine(EngineConfig(model=str(world.folder), num_threads=1, merged_lane=False))
    try:
        await engine.load_adapter("first", world.adapters["first"])
        with pytest.raises(FailedPreconditionError, match=r"engine\.merged_lane is off"):
            await engine.merge_adapter("first")
        assert engine.stats().merged == BASE
    finally:
        await engine.close()


def test_a_weight_that_two_layers_share_is_not_touched() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    model.layers[1].weight = model.layers[0].weight
    before = model.layers[1].weight.clone()
    x = torch.randn(1, 3, 6)
    plain = model.layers[1](x)
    table = AdapterTable(model)
    with torch.inference_mode():
        table.install(1, AdapterWeights({"layers.0": (torch.randn(6, 2), torch.randn(2, 5))}))
        unmerged = route_and_run(table, model, x, 1)
        table.merge(1, merged_weights(table.pairs(1)))
        assert torch.allclose(route_and_run(table, model, x, 1), unmerged, atol=1e-6)
        assert table.routes.num_unmerged == 0
    assert torch.equal(model.layers[1].weight, before)
    assert torch.equal(model.layers[1](x), plain)


def route_and_run(table: AdapterTable, model: nn.Module, x: torch.Tensor, serial: int) -> torch.Tensor:
    table.route([serial], [0, x.shape[1]])
    result: torch.Tensor = model.layers[0](x)
    return result


def test_a_step_runs_on_the_merged_weights_where_that_leaves_fewer_low_rank_terms() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    table = AdapterTable(model)
    for serial in (1, 2):
        table.install(serial, AdapterWeights({"layers.0": (torch.randn(4, 2), torch.randn(2, 4))}))
    table.merge(1, merged_weights(table.pairs(1)))
    assert sorted([1, 0, 2], key=table.order) == [0, 2, 1]
    table.route([0, 2, 2, 1], [0, 1, 2, 3, 8])
    assert (table.routes.num_unmerged, table.routes.slices) == (3, [(2, 1, 3)])
    table.route([0, 1], [0, 4, 8])
    assert (table.routes.num_unmerged, table.routes.slices) == (None, [(1, 4, 8)])
    table.route([0, 2], [0, 4, 8])
    assert (table.routes.num_unmerged, table.routes.slices) == (None, [(2, 4, 8)])
    table.unmerge()
    table.route([0, 1], [0, 1, 8])
    assert (table.routes.num_unmerged, table.routes.slices) == (None, [(1, 1, 8)])
