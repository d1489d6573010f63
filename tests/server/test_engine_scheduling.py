"""Who runs when: priority, preemption, prefixes in the making, aborts, limits, the end of the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from nightschool_server.engine import PRACTICE_PRIORITY, Delta, GenerateRequest
from nightschool_server.engines.scheduler import Limits, share_of
from nightschool_server.engines.transformers_engine import TransformersEngine
from nightschool_server.errors import (
    ContextOverflowError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
)

from tests.server.engine_world import Answer, World, answer, answers, request
from tests.server.guided_tools import ORDER, checked_calls, prompt_of
from tests.server.tiny_models import CONTEXT, make_adapter, make_qwen2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("scheduling")
    folder = make_qwen2(home / "model")
    return World(folder, {"first": make_adapter(folder, home / "first", seed=1)})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World) -> AsyncIterator[TransformersEngine]:
    async with world.engine() as running:
        yield running


class Watched:
    """A request that runs in a task, with an event for its first delta."""

    def __init__(self, engine: TransformersEngine, asked: GenerateRequest) -> None:
        self.asked, self.got, self.started = asked, Answer(), asyncio.Event()
        self._stream = engine.generate(asked)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> Answer:
        async for delta in self._stream:
            self.got.add(delta)
            self.started.set()
        return self.got


async def until_waiting(engine: TransformersEngine, count: int) -> None:
    """Let other tasks run until so many sequences wait for a slot: the engine has no event for that."""
    while engine.stats().num_waiting < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


@contextmanager
def standing(engine: TransformersEngine) -> Iterator[None]:
    """Let the engine stand between two steps, so that what is asked of it in the block comes while it is as it is."""
    leave = threading.Event()

    def stand() -> None:
        leave.wait(60)

    engine._loop._put(stand)
    try:
        yield
    finally:
        leave.set()


def practice(text: str, max_tokens: int, adapter: str = "first", **sampling: object) -> GenerateRequest:
    return request(text, adapter, PRACTICE_PRIORITY, max_tokens=max_tokens, ignore_eos=True, **sampling)


async def test_a_live_request_takes_a_slot_from_practice_which_resumes_unchanged(world: World) -> None:
    async with world.engine(num_slots=2, num_retained_slots=0) as engine:
        asked = [practice("fox " * 9, 300), practice("dog", 300, temperature=1.0, seed=3)]
        alone = [await answer(engine, r) for r in asked]
        watched = [Watched(engine, r) for r in asked]
        for one in watched:
            await one.started.wait()
        with standing(engine):
            asking = [asyncio.create_task(answer(engine, request(f"Hello {i}"))) for i in range(5)]
            await until_waiting(engine, 5)
        live = await asyncio.gather(*asking)
        assert not any(one.task.done() for one in watched), "both slots were practice's for long"
        for i, got in enumerate(live):
            assert got.token_ids == world.reference.greedy(request(f"Hello {i}").prompt, 24)
        for one, before in zip(watched, alone, strict=True):
            after = await one.task
            assert (after.token_ids, after.text) == (before.token_ids, before.text)
        assert alone[0].token_ids == world.reference.greedy(asked[0].prompt, 300, "first", ignore_eos=True)


async def test_a_guided_answer_that_loses_its_slot_goes_on_in_its_grammar(world: World) -> None:
    async with world.engine(num_slots=1, num_retained_slots=0) as engine:
        held = request(prompt_of(ORDER), "first", PRACTICE_PRIORITY, temperature=1.5, seed=3, max_tokens=380)
        alone = await answer(engine, held)
        watched = Watched(engine, held)
        await watched.started.wait()
        with standing(engine):
            live = asyncio.create_task(answer(engine, request("Hello", max_tokens=4)))
            await until_waiting(engine, 1)
        await live
        assert not watched.task.done(), "the slot was practice's for long"
        assert (await watched.task).token_ids == alone.token_ids
        assert checked_calls(alone.text, alone.finish_reason, ORDER)


async def test_waiting_live_requests_go_before_waiting_practice(world: World) -> None:
    async with world.engine(num_slots=1) as engine:
        order: list[str] = []

        async def note(name: str, asked: GenerateRequest) -> None:
            await answer(engine, asked)
            order.append(name)

        first = Watched(engine, request("dog", max_tokens=100, ignore_eos=True))
        await first.started.wait()
        with standing(engine):
            tasks = [asyncio.create_task(note(f"practice {i}", practice(f"fox {i}", 30))) for i in range(2)]
            await until_waiting(engine, 2)
            tasks += [asyncio.create_task(note("live", request("cat", max_tokens=30, ignore_eos=True)))]
            await until_waiting(engine, 3)
        await asyncio.gather(first.task, *tasks)
        assert order == ["live", "practice 0", "practice 1"]


async def test_practice_steps_in_small_numbers_beside_live(world: World) -> None:
    async with world.engine(max_practice_rows_with_live=1) as engine:
        rows = [Watched(engine, practice(f"row {i}", 250)) for i in range(4)]
        for one in rows:
            await one.started.wait()
        with standing(engine):
            asking = asyncio.create_task(answer(engine, request("cat", max_tokens=100, ignore_eos=True)))
            await until_waiting(engine, 1)
            counts = [len(one.got.token_ids) for one in rows]
        live = await asking
        grown = [len(one.got.token_ids) - before for one, before in zip(rows, counts, strict=True)]
        assert len(live.token_ids) == 100
        # The row that came first goes on beside the live one; the others stand still but for the steps around it, of
        # which all get as many.
        *_, second, first = sorted(grown)
        assert first - second > 60
        for one in rows:
            got = await one.task
            assert got.token_ids == world.reference.greedy(one.asked.prompt, 250, "first", ignore_eos=True)


@pytest.mark.parametrize(("live_linger_s", "is_thin"), [(600.0, True), (0.0, False)])
async def test_practice_is_thin_between_live_requests_and_full_when_none_comes(
    world: World, live_linger_s: float, is_thin: bool
) -> None:
    async with world.engine(max_practice_rows_with_live=1, live_linger_s=live_linger_s) as engine:
        await answer(engine, request("cat", max_tokens=2))
        order: list[str] = []

        async def practise(number: int) -> Answer:
            got = Answer()
            async for delta in engine.generate(practice(f"row {number}", 120)):
                if not got.token_ids:
                    order.append(f"begin {number}")
                got.add(delta)
            order.append(f"end {number}")
            return got

        with standing(engine):
            running = [asyncio.create_task(practise(number)) for number in range(6)]
            await until_waiting(engine, 6)
        rows = await asyncio.gather(*running)
        # Four tokens a step are four rows; the fifth gets its turn when one of them has ended.
        assert (order.index("begin 5") > order.index("end 0")) == is_thin
        for number, row in enumerate(rows):
            prompt = practice(f"row {number}", 120).prompt
            assert row.token_ids == world.reference.greedy(prompt, 120, "first", ignore_eos=True)


def test_practice_gets_the_less_of_a_step_the_sooner_a_live_request_may_come() -> None:
    limits = Limits(32, 8, 512, 4, 0.5)
    beside, between, lately, long_ago = (
        share_of(limits, live, since) for live, since in ((True, 0.0), (False, 0.1), (False, 2.0), (False, 60.0))
    )
    assert [share.num_tokens for share in (beside, between, lately, long_ago)] == [4, 16, 96, 544]
    assert [share.num_prefill for share in (beside, between, lately, long_ago)] == [4, 16, 64, 512]
    assert [share.num_images for share in (beside, between, lately, long_ago)] == [1, 1, 1, 4]
    assert share_of(Limits(32, 8, 512, 4, 0.0), False, 0.0) == long_ago, "without a linger none came lately"


async def test_long_prompts_of_practice_are_computed_rightly_a_while_after_a_live_request(world: World) -> None:
    async with world.engine(max_practice_rows_with_live=1, live_linger_s=0.02) as engine:
        asked = [practice(f"{number} fox and {number} dogs " * 12, 20) for number in range(6)]
        running = [asyncio.create_task(answer(engine, one)) for one in asked]
        await answer(engine, request("cat", max_tokens=2))
        for one, task in zip(asked, running, strict=True):
            got = await task
            assert got.token_ids == world.reference.greedy(one.prompt, 20, "first", ignore_eos=True)


async def test_requests_with_one_long_prefix_wait_for_its_prefill(world: World) -> None:
    async with world.engine() as engine:
        requests = [request("apples and pears " * 10 + str(i)) for i in range(6)]
        found = await asyncio.gather(*(answer(engine, r) for r in requests))
        assert sum(got.num_cached_tokens < 20 for got in found) == 1
        for asked, got in zip(requests, found, strict=True):
            assert got.token_ids == world.reference.greedy(asked.prompt, 24)


async def test_closing_the_iterator_frees_the_slot(world: World) -> None:
    async with world.engine(num_slots=1) as engine:
        for _ in range(3):
            stream = engine.generate(request("dog", max_tokens=450, ignore_eos=True))
            first = await anext(stream)
            assert isinstance(first, Delta)
            await stream.aclose()
        assert len((await answer(engine, request("cat"))).token_ids) > 0
        assert engine.stats().num_running == engine.stats().num_waiting == 0
        assert engine.stats().num_generated_tokens < 2 * 450, "three that ran on would be more"


async def test_cancelling_the_task_frees_the_slot_running_or_waiting(world: World) -> None:
    async with world.engine(num_slots=1) as engine:
        running = Watched(engine, request("dog", max_tokens=400, ignore_eos=True))
        await running.started.wait()
        with standing(engine):
            waiting = Watched(engine, request("cat", n=1))
            scoring = asyncio.create_task(engine.score(request("Hi").prompt, " fox"))
            await until_waiting(engine, 2)
            for task in (waiting.task, scoring, running.task):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert len((await answer(engine, request("fox"))).token_ids) > 0
        assert engine.stats().num_waiting == 0


async def test_too_many_waiting_are_refused_and_practice_never_crowds_out_live(world: World) -> None:
    async with world.engine(num_slots=1, max_waiting=2) as engine:
        first = Watched(engine, request("dog", max_tokens=400, ignore_eos=True))
        await first.started.wait()
        with standing(engine):
            queued = [asyncio.create_task(answer(engine, practice(f"fox {i}", 2))) for i in range(3)]
            await until_waiting(engine, 3)
            with pytest.raises(OverloadedError, match="3 sequences wait for a slot"):
                await answer(engine, practice("one more", 2))
            live = asyncio.create_task(answer(engine, request("cat", max_tokens=2)))
            await until_waiting(engine, 4)
            first.task.cancel()
        assert len((await live).token_ids) > 0
        await asyncio.gather(*queued)


async def test_too_long_a_prompt_or_answer_is_refused_with_the_numbers(world: World) -> None:
    async with world.engine() as engine:
        num_prompt = (await answer(engine, request("Hi"))).num_prompt_tokens
        fits = request("Hi", max_tokens=CONTEXT - num_prompt, ignore_eos=True)
        assert len((await answer(engine, fits)).token_ids) == CONTEXT - num_prompt
        with pytest.raises(
            ContextOverflowError, match=rf"{num_prompt} tokens and max_tokens 512 .* {CONTEXT}"
        ) as caught:
            await answer(engine, request("Hi", max_tokens=CONTEXT))
        assert caught.value.field == "max_tokens"
        with pytest.raises(
            ContextOverflowError, match=rf"prompt has \d+ tokens; the context holds {CONTEXT}"
        ) as caught:
            await answer(engine, request("fox " * 600))
        assert caught.value.field == "messages"
        with pytest.raises(ContextOverflowError):
            await engine.score(request("Hi").prompt, "fox " * 600)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("n", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
    ],
)
async def test_sampling_out_of_bounds_is_refused(engine: TransformersEngine, field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=rf"{field} is {value}; it must be") as caught:
        await answer(engine, request("Hi", **{field: value}))
    assert caught.value.field == field


async def test_closing_ends_streams_with_cancelled(world: World) -> None:
    async with world.engine(num_slots=1) as engine:
        running = Watched(engine, request("dog", max_tokens=400, ignore_eos=True))
        await running.started.wait()
        with standing(engine):
            waiting = asyncio.create_task(answers(engine, request("cat", n=2)))
            await until_waiting(engine, 2)
        await engine.close()
        assert (await running.task).finish_reason == "cancelled"
        assert [got.finish_reason for got in await waiting] == ["cancelled", "cancelled"]
        assert not engine.healthy()
        with pytest.raises(EngineDeadError):
            await answer(engine, request("Hi"))


async def test_a_failing_step_fails_every_caller_and_the_engine_says_so(world: World) -> None:
    async with world.engine(num_slots=1) as engine:
        running = Watched(engine, request("dog", max_tokens=400, ignore_eos=True))
        await running.started.wait()
        waiting = asyncio.create_task(answer(engine, request("cat")))
        scoring = asyncio.create_task(engine.score(request("Hi").prompt, " fox"))
        # Cut the embedding down to one token: the next step cannot but raise.
        embedding = engine._runner.parts.model.get_input_embeddings()
        embedding.weight = torch.nn.Parameter(embedding.weight[:1].clone(), requires_grad=False)
        for task in (running.task, waiting, scoring):
            with pytest.raises(EngineDeadError, match="restart the server"):
                await task
        assert not engine.healthy()
        for call in (answer(engine, request("Hi")), engine.load_adapter("x", Path("/nowhere"))):
            with pytest.raises(EngineDeadError):
                await call
