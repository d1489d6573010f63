"""Guided calls: whatever the weights say, a call fits its schema, and nothing else in the batch notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest
import pytest_asyncio
import torch
from nightschool_server.agent.toolcalls import CLOSE, OPEN, parse_answer, write_call
from nightschool_server.engine import BASE, Delta, Engine, GenerateRequest
from nightschool_server.engines.matching import Guide, hold
from nightschool_server.errors import InvalidRequestError

from tests.server.engine_world import Answer, World, answer, answers, num_cached, request
from tests.server.guided_tools import ASK, ORDER, PRICE, UNGUIDABLE, checked_calls, prompt_of
from tests.server.tiny_models import make_adapter, make_qwen2

ROOM = 380
"""Tokens that hold a call of ORDER in every spelling."""


@pytest.fixture(scope="module", params=[False, True], ids=["spelled", "one token"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("guided")
    folder = make_qwen2(home / "model", call_marks=request.param)
    return World(folder, {"first": make_adapter(folder, home / "first", seed=1)})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World) -> AsyncIterator[Engine]:
    async with world.engine() as running:
        yield running


def guide_of(world: World) -> Guide:
    tokenizer = world.reference.tokenizer
    return Guide(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))


def greedy_reference(world: World, asked: GenerateRequest) -> tuple[list[int], list[float]]:
    """Token ids and logprobs of the greedy guided answer, one whole forward for each token."""
    matcher = guide_of(world).compiled(asked.prompt).matcher()
    ids: list[int] = []
    logprobs: list[float] = []
    while len(ids) < asked.sampling.max_tokens and not matcher.ended:
        row = world.reference.logprobs(asked.prompt, [*ids, 0], asked.adapter)[-1:].clone()
        hold(row, {0: matcher})
        ids.append(int(row.argmax()))
        logprobs.append(float(row.log_softmax(-1)[0, ids[-1]]))
        matcher.accept(ids[-1])
    return ids, logprobs


@pytest.mark.parametrize("adapter", [BASE, "first"])
async def test_hot_samples_are_calls_that_fit_the_schema(engine: Engine, adapter: str) -> None:
    asked = request(prompt_of(ORDER), adapter, temperature=1.5, seed=11, n=8, max_tokens=ROOM)
    found = await answers(engine, asked)
    calls = [checked_calls(got.text, got.finish_reason, ORDER) for got in found]
    assert all(calls)
    assert len({call.arguments for some in calls for call in some}) >= 8
    for got in found:
        parsed = parse_answer(got.text)
        assert parsed.error is not None or not parsed.text, "nothing but calls is said where a call is required"
        assert got.text.startswith(write_call("order", {"colour": "?"}).partition("?")[0])


@pytest.mark.parametrize("adapter", [BASE, "first"])
async def test_a_greedy_guided_answer_is_the_references(world: World, engine: Engine, adapter: str) -> None:
    asked = request(prompt_of(ORDER, PRICE, ASK), adapter, max_tokens=90, logprobs=True, top_logprobs=3)
    ids, logprobs = greedy_reference(world, asked)
    for got in (
        await answer(engine, asked),
        *await answers(engine, request(asked.prompt, adapter, n=2, max_tokens=90)),
    ):
        assert got.token_ids == ids
    got = await answer(engine, asked)
    assert got.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert all(top[0].logprob >= top[-1].logprob > float("-inf") for top in got.top_logprobs)
    assert min(len(top) for top in got.top_logprobs) < 3, "where the grammar leaves one token, one is reported"


async def test_rows_beside_guided_ones_are_what_they_are_alone(engine: Engine) -> None:
    free = [request(f"Count {i}", ("first", BASE)[i % 2], temperature=0.9, seed=i, max_tokens=40) for i in range(4)]
    held = [request(prompt_of(ORDER, text=f"Count {i}"), ("first", BASE)[i % 2], max_tokens=60) for i in range(4)]
    alone = [(await answer(engine, asked)).token_ids for asked in (*free, *held)]
    together = await asyncio.gather(*(answer(engine, asked) for asked in (*free, *held)))
    assert [got.token_ids for got in together] == alone


async def test_samples_of_one_request_do_not_share_their_state(engine: Engine) -> None:
    asked = request(prompt_of(ORDER), temperature=1.5, seed=40, n=3, max_tokens=ROOM)
    singles = [
        await answer(engine, request(prompt_of(ORDER), temperature=1.5, seed=40 + i, max_tokens=ROOM)) for i in range(3)
    ]
    assert [got.token_ids for got in await answers(engine, asked)] == [got.token_ids for got in singles]


async def test_strict_tools_and_others_stand_beside_each_other(engine: Engine) -> None:
    tools = (ORDER, PRICE, ASK)
    found = await answers(engine, request(prompt_of(*tools), temperature=2.0, seed=5, n=12, max_tokens=ROOM))
    calls = [call for got in found for call in checked_calls(got.text, got.finish_reason, *tools)]
    assert {call.name for call in calls} >= {"price", "order"}


async def test_a_call_in_free_text_is_held_from_its_mark_on(world: World, engine: Engine) -> None:
    if OPEN not in world.reference.tokenizer.get_vocab():
        pytest.skip("random text does not spell the mark; test_guidance.py does")
    prompt = prompt_of(ORDER, PRICE, tool_choice="auto")
    found = await answers(engine, request(prompt, temperature=2.0, seed=3, n=32, max_tokens=ROOM))
    calls = [call for got in found for call in parse_answer(got.text).calls]
    assert len(calls) >= 3
    assert any(not got.text.startswith(OPEN) for got in found)
    for got in found:
        assert got.text.count(OPEN) - len(parse_answer(got.text).calls) <= (got.finish_reason == "length")
        checked_calls(got.text, got.finish_reason, ORDER, PRICE)


async def test_strict_does_not_show_in_the_prompt_and_text_without_a_call_is_free(world: World, engine: Engine) -> None:
    text = "fox " * 20
    asked = request(prompt_of(PRICE, text=text, tool_choice="auto"), max_tokens=40)
    not_strict = prompt_of(replace(PRICE, strict=False), text=text, tool_choice="auto")
    plain = await answer(engine, request(not_strict, max_tokens=40))
    strict = await answer(engine, asked)
    assert strict.num_prompt_tokens == plain.num_prompt_tokens
    assert strict.num_cached_tokens == num_cached(plain.num_prompt_tokens) > 0
    assert strict.token_ids == greedy_reference(world, asked)[0]


async def test_the_merged_lane_guides_alike(engine: Engine) -> None:
    requests = [request(prompt_of(ORDER, PRICE), name, max_tokens=90) for name in (BASE, "first", "first")]
    expected = [(await answer(engine, asked)).token_ids for asked in requests]
    try:
        await engine.merge_adapter("first")
        merged = await asyncio.gather(*(answer(engine, asked) for asked in requests))
    finally:
        await engine.merge_adapter(BASE)
    assert [got.token_ids for got in merged] == expected


async def test_a_call_streams_in_order_and_can_be_left_in_its_middle(world: World, engine: Engine) -> None:
    asked = request(prompt_of(ORDER), max_tokens=ROOM)
    matcher = guide_of(world).compiled(asked.prompt).matcher()
    got = Answer()
    logits = torch.zeros(1, len(world.reference.tokenizer))
    async with aclosing(_deltas(engine, asked)) as deltas:
        async for delta in deltas:
            got.add(delta)
            for token_id in delta.token_ids:
                row = logits.clone()
                hold(row, {0: matcher})
                assert row[0, token_id] == 0, "every token is one that the grammar left"
                matcher.accept(token_id)
            if '"arguments": ' in got.text:
                break
    assert got.finish_reason is None
    assert got.text.startswith(f'{OPEN}\n{{"name": "order", "arguments": ')
    # What is left behind takes no place, and its grammar serves the next request from its beginning.
    whole = await answer(engine, asked)
    assert whole.token_ids[: len(got.token_ids)] == got.token_ids
    assert checked_calls(whole.text, whole.finish_reason, ORDER)


async def test_stop_strings_and_the_budget_end_a_call_where_they_are_met(engine: Engine) -> None:
    stopped = await answer(engine, request(prompt_of(ORDER), max_tokens=ROOM, stop=(', "gift"',)))
    assert stopped.finish_reason == "stop"
    assert '"count": ' in stopped.text
    assert "gift" not in stopped.text
    short = await answer(engine, request(prompt_of(ORDER), max_tokens=12))
    assert (short.finish_reason, len(short.token_ids)) == ("length", 12)
    assert parse_answer(short.text).error == f"{OPEN} without {CLOSE}"


async def test_a_row_that_runs_on_behind_its_end_is_free(world: World, engine: Engine) -> None:
    prompt = prompt_of(PRICE)
    for seed in range(20):
        hot = {"temperature": 1.5, "seed": seed}
        held = await answer(engine, request(prompt, max_tokens=200, **hot))
        if held.finish_reason == "stop":
            break
    assert held.finish_reason == "stop"
    end = len(held.token_ids)
    on = await answer(engine, request(prompt, max_tokens=end + 6, ignore_eos=True, logprobs=True, **hot))
    assert on.token_ids[:end] == held.token_ids
    free = world.reference.logprobs(prompt, on.token_ids)[range(end, end + 6), on.token_ids[end:]]
    assert on.logprobs[end:] == pytest.approx(free.tolist(), abs=1e-4)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_schema_that_cannot_be_guided_is_refused(engine: Engine, n: int) -> None:
    asked = request(prompt_of(PRICE, UNGUIDABLE, tool_choice="auto"), temperature=1.0, n=n)
    with pytest.raises(
        InvalidRequestError, match=r"tool 'sort' cannot be guided .*uniqueItems.*simplify it, or drop strict"
    ) as caught:
        await answers(engine, asked)
    assert caught.value.field == "tools"
    with pytest.raises(InvalidRequestError, match="there are no tools") as caught:
        await answers(engine, request(prompt_of(), n=n))
    assert caught.value.field == "tool_choice"
    assert (await answer(engine, request(prompt_of(PRICE), max_tokens=80))).text.startswith(OPEN)


async def _deltas(engine: Engine, asked: GenerateRequest) -> AsyncIterator[Delta]:
    async for delta in engine.generate(asked):
        yield delta
