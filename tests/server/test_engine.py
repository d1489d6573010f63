"""The engine against transformers' own generate: greedy answers are the same tokens in every mix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nightschool_server.chat import assistant, system, user
from nightschool_server.engine import BASE, Engine, GenerateRequest, Prompt
from nightschool_server.errors import AdapterFormatError

from tests.server.engine_world import KIND, Answer, World, answer, answers, num_cached, pictures, prompt_with, request
from tests.server.tiny_models import make_adapter, make_idefics3, make_qwen2, make_qwen2_vl

TEXTS = [
    "Hi",
    "What is the price of seven red apples and three green pears?",
    "fox " * 40,
    "How many are left? " * 6,
    "The quick brown fox jumps over the lazy dog while the grey cat sleeps.",
]


def sliding(folder: Path) -> Path:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return make_qwen2(folder, use_sliding_window=True, sliding_window=12, layer_types=layers, num_key_value_heads=2)


MAKERS = {"qwen2": make_qwen2, "sliding": sliding, "idefics3": make_idefics3, "qwen2_vl": make_qwen2_vl}
if KIND == "vllm":
    # Its Qwen2 knows no layers of different windows; its Qwen2-VL imports torchvision, which this environment has not.
    del MAKERS["sliding"], MAKERS["qwen2_vl"]


@pytest.fixture(scope="module", params=list(MAKERS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp(request.param)
    folder = MAKERS[request.param](home / "model")
    first = make_adapter(folder, home / "first", seed=1)
    second = make_adapter(folder, home / "second", seed=2, r=8, lora_alpha=4, use_rslora=True)
    return World(folder, {"first": first, "second": second})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World) -> AsyncIterator[Engine]:
    async with world.engine() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chunked(world: World) -> AsyncIterator[Engine]:
    """An engine that takes prompts in small pieces."""
    async with world.engine(prefill_chunk_tokens=7) as running:
        yield running


def mixed(world: World) -> list[GenerateRequest]:
    """Ragged prompts on the base and two adapters, with images where the model sees."""
    prompts = [Prompt((user(text),)) for text in TEXTS]
    prompts.append(Prompt((system("You are a helpful assistant."), user("Hello"), assistant("apples"), user("why?"))))
    if world.reference.sees:
        one, two, three = pictures(1, 2, 3)
        prompts += [prompt_with("How many?", one), prompt_with("Which is red?", two, three), prompt_with("Again", one)]
    names = [BASE, "first", "second"]
    return [request(p, names[(i + j) % 3], max_tokens=8 + 3 * i) for i, p in enumerate(prompts) for j in range(3)]


def check(world: World, asked: GenerateRequest, got: Answer) -> None:
    sampling = asked.sampling
    expected = world.reference.greedy(asked.prompt, sampling.max_tokens, asked.adapter, ignore_eos=sampling.ignore_eos)
    assert got.token_ids == expected
    assert got.text == world.reference.tokenizer.decode(expected, skip_special_tokens=True)
    assert got.num_prompt_tokens == world.reference.inputs(asked.prompt)["input_ids"].shape[1]
    ended = expected[-1] == world.reference.tokenizer.eos_token_id and not sampling.ignore_eos
    assert got.finish_reason == ("stop" if ended else "length")


async def test_one_request_alone(world: World, engine: Engine) -> None:
    asked = request(TEXTS[1])
    check(world, asked, await answer(engine, asked))


async def test_base_two_adapters_text_and_images_in_one_batch(world: World, engine: Engine) -> None:
    requests = mixed(world)
    for asked, got in zip(requests, await asyncio.gather(*(answer(engine, r) for r in requests)), strict=True):
        check(world, asked, got)


async def test_more_requests_than_slots(world: World) -> None:
    requests = mixed(world)
    async with world.engine(num_slots=3, num_retained_slots=0) as engine:
        for asked, got in zip(requests, await asyncio.gather(*(answer(engine, r) for r in requests)), strict=True):
            check(world, asked, got)


async def test_requests_that_join_and_leave_while_others_run(world: World, engine: Engine) -> None:
    requests = mixed(world)
    long = request(TEXTS[2], "first", max_tokens=60, ignore_eos=True)
    kept, started = Answer(), asyncio.Event()

    async def watch() -> None:
        async for delta in engine.generate(long):
            kept.add(delta)
            started.set()

    watcher = asyncio.create_task(watch())
    await started.wait()
    for asked in requests[:6]:
        stream = engine.generate(request(asked.prompt, asked.adapter, max_tokens=100, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        check(world, asked, await answer(engine, asked))
    await watcher
    check(world, long, kept)


async def test_prompts_prefilled_in_small_chunks(world: World, chunked: Engine) -> None:
    requests = mixed(world)
    for asked, got in zip(requests, await asyncio.gather(*(answer(chunked, r) for r in requests)), strict=True):
        check(world, asked, got)


async def test_prefixes_taken_from_the_cache(world: World, engine: Engine) -> None:
    images = pictures(11) if world.reference.sees else []
    first = prompt_with("What is the price of seven red apples? Say it.", *images)
    for adapter in (BASE, "second"):
        asked = request(first, adapter, max_tokens=12)
        once = await answer(engine, asked)
        again = await answer(engine, asked)
        check(world, asked, again)
        assert again.num_cached_tokens == num_cached(again.num_prompt_tokens)
        following = Prompt((*first.messages, assistant(once.text), user("And then?")), images=first.images)
        step = await answer(engine, request(following, adapter))
        check(world, request(following, adapter), step)
        assert step.num_cached_tokens >= num_cached(once.num_prompt_tokens)


async def test_the_same_text_with_another_image_is_not_the_same_prefix(world: World, engine: Engine) -> None:
    if not world.reference.sees:
        pytest.skip("a text model")
    one, other = pictures(21, 25)
    asked = [request(prompt_with("Look at it, please.", data)) for data in (one, other)]
    got = [await answer(engine, r) for r in asked]
    for r, a in zip(asked, got, strict=True):
        check(world, r, a)
    assert got[1].num_cached_tokens < 16


async def test_samples_of_one_request_share_their_prefill(world: World, engine: Engine) -> None:
    asked = request("Name the grey cat and the lazy dog, five times.", "first", n=5)
    found = await answers(engine, asked)
    for got in found:
        check(world, asked, got)
    assert all(got.num_cached_tokens >= num_cached(got.num_prompt_tokens) for got in found[1:])


async def test_an_engine_counts_the_time_in_which_it_works(engine: Engine) -> None:
    before = engine.stats().busy_s
    await answer(engine, request("How long does it take?"))
    after = engine.stats().busy_s
    assert after > before
    await asyncio.sleep(0)
    assert engine.stats().busy_s == after, "and no other time"


async def test_the_same_prompt_on_other_adapters_shares_no_prefix(world: World, engine: Engine) -> None:
    prompt = Prompt((user("Only this prompt, whoever answers it."),))
    for adapter in ("first", "second", BASE):
        # The system part that other tests share is a few tokens; the rest of this prompt is its own.
        got = await answer(engine, request(prompt, adapter))
        check(world, request(prompt, adapter), got)
        assert got.num_cached_tokens < 8


async def test_scores_equal_the_reference(world: World, chunked: Engine) -> None:
    prompts = [Prompt((user(TEXTS[2]),)), Prompt((user("Hi"),))]
    if world.reference.sees:
        prompts.append(prompt_with("Which is red?", *pictures(31, 32)))
    following = " The lazy dog sleeps, and the fox answers: " * 4
    jobs = [(p, a) for p in prompts for a in (BASE, "first", "second")]
    found = await asyncio.gather(*(chunked.score(p, following, adapter=a) for p, a in jobs))
    for (prompt, adapter), scores in zip(jobs, found, strict=True):
        ids = world.reference.tokenizer(following, add_special_tokens=False)["input_ids"]
        assert list(scores.token_ids) == ids
        logprobs = world.reference.logprobs(prompt, ids, adapter)
        expected = [float(logprobs[i, t]) for i, t in enumerate(ids)]
        assert scores.logprobs == pytest.approx(expected, abs=1e-4)
    again = await chunked.score(prompts[0], following)
    assert again.logprobs == pytest.approx(found[0].logprobs, abs=1e-4)


async def test_logprobs_equal_the_reference(world: World, engine: Engine) -> None:
    for adapter in (BASE, "second"):
        asked = request(TEXTS[3], adapter, temperature=0.7, seed=5, logprobs=True, top_logprobs=3)
        got, _ = await asyncio.gather(answer(engine, asked), answer(engine, request(TEXTS[0], "first")))
        logprobs = world.reference.logprobs(asked.prompt, got.token_ids, adapter)
        assert got.logprobs == pytest.approx([float(logprobs[i, t]) for i, t in enumerate(got.token_ids)], abs=1e-4)
        for position, tops in enumerate(got.top_logprobs):
            values, ids = logprobs[position].topk(3)
            assert [top.token_id for top in tops] == ids.tolist()
            assert [top.logprob for top in tops] == pytest.approx(values.tolist(), abs=1e-4)
            assert tops[0].token == world.reference.tokenizer.decode([tops[0].token_id])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
async def test_an_adapter_of_other_linears_than_the_decoders_is_refused(
    world: World, engine: Engine, tmp_path: Path
) -> None:
    if world.reference.sees:
        targets = r".*(vision_model|visual).*(q_proj|qkv)"
        says = r"(vision_model|visual)\..* is not a Linear of the text tower's decoder layers"
    else:
        targets, says = r".*lm_head", r"lm_head\..* is not lora_A"
    other = make_adapter(world.folder, tmp_path / "other", seed=5, target_modules=targets)
    with pytest.raises(AdapterFormatError, match=says):
        await engine.load_adapter("other", other)
