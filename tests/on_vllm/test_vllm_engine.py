"""What the engine on vLLM has beyond the suite that every engine passes: the lane, its limits, its death."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from nightschool_server.engine import BASE, PRACTICE_PRIORITY, GenerateRequest
from nightschool_server.engines.model_folder import read_model_folder
from nightschool_server.engines.on_vllm.core import VLLMEngineConfig
from nightschool_server.engines.on_vllm.grouped import GroupedLoRA, is_right
from nightschool_server.engines.on_vllm.processes import is_engine
from nightschool_server.engines.vllm_engine import VLLMEngine
from nightschool_server.errors import (
    ConfigError,
    EngineDeadError,
    FailedPreconditionError,
    InvalidRequestError,
    ModelFormatError,
    OverloadedError,
    UnknownAdapterError,
)
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from tests.server.engine_world import World, answer, num_cached, pictures, prompt_with, request
from tests.server.tiny_models import make_adapter, make_idefics3, make_qwen2

TOLERANCE_NATS = 1e-4
"""Of a token's logprob in float32, merged against not: what rounding in another order comes to."""

OTHER_TARGETS = r".*(text_model|language_model|model)\.layers.*(q_proj|k_proj|gate_proj)"
"""Partly those of `make_adapter`'s own; q, k and gate are parts of what vLLM packs into one Linear."""

FOLLOWING = " The lazy dog sleeps, and the fox answers."


@pytest.fixture(scope="module", params=[make_qwen2, make_idefics3])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp(request.param.__name__)
    folder = request.param(home / "model")
    first = make_adapter(folder, home / "first", seed=1)
    second = make_adapter(folder, home / "second", seed=2, r=16, lora_alpha=8, target_modules=OTHER_TARGETS)
    return World(folder, {"first": first, "second": second})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World) -> AsyncIterator[VLLMEngine]:
    async with world.engine(max_cpu_loras=4) as running:
        assert isinstance(running, VLLMEngine)
        yield running


def mixed(world: World) -> list[GenerateRequest]:
    prompts = [request(text).prompt for text in ("Hi", "What is the price of seven red apples?", "fox " * 40)]
    if world.reference.sees:
        prompts.append(prompt_with("Which is red?", *pictures(1, 2)))
    return [request(prompt, name) for prompt in prompts for name in (BASE, "first", "second")]


async def check_answers(world: World, engine: VLLMEngine) -> None:
    """Every answer of a mixed batch, and every adapter's logprobs, are the reference's."""
    requests = mixed(world)
    for asked, got in zip(requests, await asyncio.gather(*(answer(engine, r) for r in requests)), strict=True):
        assert got.token_ids == world.reference.greedy(asked.prompt, 24, asked.adapter), asked.adapter
    ids = world.reference.tokenizer(FOLLOWING, add_special_tokens=False)["input_ids"]
    for name in (BASE, "first", "second"):
        found = await engine.score(requests[-1].prompt, FOLLOWING, adapter=name)
        logprobs = world.reference.logprobs(requests[-1].prompt, ids, name)
        expected = [float(logprobs[i, t]) for i, t in enumerate(ids)]
        assert found.logprobs == pytest.approx(expected, abs=TOLERANCE_NATS)


async def checksum(engine: VLLMEngine) -> float:
    (found,) = await engine._life.core().collective_rpc("nightschool_checksum")
    return float(found)


def test_what_is_repaired_is_wrong_in_this_vllm_and_right_in_ours() -> None:
    # Once vLLM is right, this fails, and `grouped.py` can go; it stopped being used by itself.
    assert not is_right(PunicaWrapperCPU)
    assert is_right(GroupedLoRA)


async def test_the_digest_that_is_made_beside_the_start_is_that_of_the_folder(world: World, engine: VLLMEngine) -> None:
    assert engine.model == read_model_folder(str(world.folder), context_length=0, max_lora_rank=64).info


async def test_whatever_is_merged_every_answer_is_the_reference(world: World, engine: VLLMEngine) -> None:
    for name in (BASE, "first", "second", "first", BASE):
        await engine.merge_adapter(name)
        assert engine.stats().merged == name
        await check_answers(world, engine)


async def test_weights_come_back_bit_for_bit_and_do_not_drift(world: World, engine: VLLMEngine) -> None:
    await engine.merge_adapter(BASE)
    base = await checksum(engine)
    await engine.merge_adapter("first")
    first = await checksum(engine)
    assert first != base
    for _ in range(10):
        await engine.merge_adapter("second")
        await engine.merge_adapter("first")
    assert await checksum(engine) == first
    await engine.merge_adapter(BASE)
    assert await checksum(engine) == base


async def test_answers_stream_unchanged_across_merges(world: World, engine: VLLMEngine) -> None:
    requests = [request(f"Count {i}", name, max_tokens=150, ignore_eos=True)
                for i in range(3) for name in (BASE, "first", "second")]  # fmt: skip
    num_merges = 0
    # Once, where the machine merges as fast as it answers.
    while num_merges < 3:
        running = [asyncio.create_task(answer(engine, r)) for r in requests]
        while not all(task.done() for task in running):
            await engine.merge_adapter(("first", "second", BASE)[num_merges % 3])
            num_merges += 1
            await asyncio.sleep(0.02)
        for asked, got in zip(requests, await asyncio.gather(*running), strict=True):
            assert got.token_ids == world.reference.greedy(asked.prompt, 150, asked.adapter, ignore_eos=True)


async def test_the_merged_adapter_is_not_unloaded_and_names_are_checked(world: World, engine: VLLMEngine) -> None:
    await engine.merge_adapter("first")
    with pytest.raises(FailedPreconditionError, match="merge another one first"):
        await engine.unload_adapter("first")
    with pytest.raises(UnknownAdapterError, match="'nobody'"):
        await engine.merge_adapter("nobody")
    await engine.merge_adapter(BASE)


async def test_one_adapter_too_many_is_refused_with_the_setting_to_raise(world: World, engine: VLLMEngine) -> None:
    await engine.load_adapter("third", world.adapters["first"])
    with pytest.raises(OverloadedError, match=r"engine\.max_cpu_loras is 4: raise it"):
        await engine.load_adapter("fourth", world.adapters["first"])
    await engine.unload_adapter("third")


async def test_a_temperature_beyond_vllm_is_refused_by_name(world: World, engine: VLLMEngine) -> None:
    with pytest.raises(InvalidRequestError, match="temperature") as caught:
        await answer(engine, request("Hi", temperature=3.0))
    assert caught.value.field == "temperature"


async def test_prefixes_in_the_cache_belong_to_one_adapter_even_when_it_is_imported_again(
    world: World, engine: VLLMEngine
) -> None:
    asked = request("The same prompt, of more tokens than two blocks of the cache. " * 4)
    reused: dict[str, list[int]] = {}
    for name, source in ((BASE, BASE), ("first", "first"), ("second", "second"), ("again", "first")):
        if name == "again":
            await engine.load_adapter(name, world.adapters[source])
        found = [await answer(engine, replace(asked, adapter=name)) for _ in range(2)]
        reused[name] = [got.num_cached_tokens for got in found]
        assert [got.token_ids for got in found] == [world.reference.greedy(asked.prompt, 24, source)] * 2
    await engine.unload_adapter("again")
    await engine.load_adapter("again", world.adapters["second"])
    got = await answer(engine, replace(asked, adapter="again"))
    assert got.token_ids == world.reference.greedy(asked.prompt, 24, "second")
    await engine.unload_adapter("again")
    held = num_cached(got.num_prompt_tokens)
    assert held > 0, "the prompt fills at least one block"
    assert list(reused.values()) == [[0, held]] * 4
    assert got.num_cached_tokens == 0


async def test_a_live_request_passes_the_practice_that_runs_and_the_practice_that_waits(
    world: World, engine: VLLMEngine
) -> None:
    num_running = VLLMEngineConfig(model="").num_slots // 2
    started = [asyncio.Event() for _ in range(num_running + 8)]
    order: list[str] = []
    running: set[int] = set()
    most_running = 0

    async def practise(number: int) -> None:
        nonlocal most_running
        asked = request(f"Practice {number}", "first", PRACTICE_PRIORITY, max_tokens=200, ignore_eos=True)
        async for delta in engine.generate(asked):
            started[number].set()
            running.add(number)
            most_running = max(most_running, len(running))
            if delta.finish_reason is not None:
                running.discard(number)
        order.append("practice")

    practice = [asyncio.create_task(practise(number)) for number in range(len(started))]
    await asyncio.gather(*(one.wait() for one in started[:num_running]))
    await answer(engine, request("Hello", max_tokens=24, ignore_eos=True))
    order.append("live")
    await asyncio.gather(*practice)
    assert most_running == num_running, "half of the slots stay free of practice"
    assert order.index("live") < len(practice), "it is answered before the practice that came first is"


async def test_more_adapters_than_slots_take_turns(world: World) -> None:
    async with world.engine(max_loras=1) as engine:
        requests = mixed(world)
        for asked, got in zip(requests, await asyncio.gather(*(answer(engine, r) for r in requests)), strict=True):
            assert got.token_ids == world.reference.greedy(asked.prompt, 24, asked.adapter)


async def test_a_killed_engine_comes_back_with_its_adapters_and_its_lane(world: World, engine: VLLMEngine) -> None:
    await engine.merge_adapter("second")
    long = request("Hi", "first", max_tokens=400, ignore_eos=True)
    stream = engine.generate(long)
    await anext(stream)
    # One that another test killed may still be there as a zombie, which is not one of them.
    (core,) = [process for process in psutil.Process().children() if is_engine(process)]
    core.send_signal(signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="try again"):
        async for _ in stream:
            pass
    assert not engine.healthy()
    with pytest.raises(EngineDeadError):
        await answer(engine, request("Hi"))
    async with asyncio.timeout(300):
        while not engine.healthy():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert engine.stats().merged == "second"
    assert set(engine.stats().adapters) == {"first", "second"}
    await check_answers(world, engine)


async def test_a_model_that_vllm_cannot_run_is_one_sentence(tmp_path: Path) -> None:
    folder = make_qwen2(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ModelFormatError, match="--engine transformers"):
        await VLLMEngine.start(VLLMEngineConfig(model=str(folder)))


def test_a_rank_that_vllm_has_no_slot_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_lora_rank 300 needs rank 600"):
        _ = VLLMEngineConfig(model="x", max_lora_rank=300).engine_rank
