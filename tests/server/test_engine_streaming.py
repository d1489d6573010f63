"""Text as it streams: whole characters, stop strings, and always what the tokenizer decodes in the end."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from nightschool_server.engine import Delta, Engine
from nightschool_server.engines.text_stream import TextStream

from tests.server.engine_world import Answer, World, answer, request
from tests.server.tiny_models import make_qwen2, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(make_qwen2(tmp_path_factory.mktemp("streaming") / "model"), {})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World) -> AsyncIterator[Engine]:
    async with world.engine() as running:
        yield running


def stream(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    """Pieces of text as they come out, and whether a stop string ended them."""
    text = TextStream(tokenizer.backend_tokenizer, stop)
    pieces: list[str] = []
    for token_id in ids:
        piece, stopped = text.push(token_id)
        pieces.append(piece)
        if stopped:
            return pieces, True
    piece, stopped = text.finish()
    return [*pieces, piece], stopped


def test_characters_of_several_bytes_are_never_split(tokenizer: Any) -> None:
    written = "naïve 日本語 🙂🙃 Ω done"
    ids = tokenizer(written)["input_ids"]
    pieces, _ = stream(tokenizer, ids)
    assert len(ids) > len(written)
    assert "".join(pieces) == written
    assert all("\ufffd" not in piece for piece in pieces)


def test_any_tokens_stream_to_what_the_tokenizer_decodes(tokenizer: Any) -> None:
    numbers = random.Random(0)
    for _ in range(300):
        ids = [numbers.randrange(len(tokenizer)) for _ in range(numbers.randrange(1, 40))]
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_cut_off_at_the_end_is_one_replacement(tokenizer: Any) -> None:
    ids = tokenizer("ok 🙂")["input_ids"][:-1]
    assert "".join(stream(tokenizer, ids)[0]) == tokenizer.decode(ids) == "ok \ufffd"


@pytest.mark.parametrize(
    "stop", [("jumps over",), ("over", "jump"), ("q",), ("never there",), ("dog.",), ("The quick",), ("",)]
)
def test_stop_strings_cut_exactly_and_nothing_of_them_leaks(tokenizer: Any, stop: tuple[str, ...]) -> None:
    written = "The quick brown fox jumps over the lazy dog."
    pieces, stopped = stream(tokenizer, tokenizer(written)["input_ids"], stop)
    cut = min((at for s in stop if s and (at := written.find(s)) >= 0), default=None)
    assert "".join(pieces) == written[:cut]
    assert stopped == (cut is not None)


def test_text_that_only_begins_like_a_stop_string_comes_out(tokenizer: Any) -> None:
    pieces, stopped = stream(tokenizer, tokenizer("a fox jumps under")["input_ids"], ("jumps over", "underneath"))
    assert ("".join(pieces), stopped) == ("a fox jumps under", False)


async def test_every_token_has_its_delta_and_the_last_one_says_why(world: World, engine: Engine) -> None:
    # So many that a reader who is kept from reading now and then gets them in more than a few pieces.
    deltas = [d async for d in engine.generate(request("Hello fox", max_tokens=300, ignore_eos=True))]
    assert sum(len(d.token_ids) for d in deltas) == 300
    assert len(deltas) > 5, "tokens come as they are sampled"
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert len({(d.num_prompt_tokens, d.num_cached_tokens) for d in deltas}) == 1


async def test_a_stop_string_ends_the_answer_before_it(world: World, engine: Engine) -> None:
    whole = await answer(engine, request("Hello fox", max_tokens=40, ignore_eos=True))
    clean = [i for i in range(3, len(whole.text) - 4) if "\ufffd" not in whole.text[i : i + 3]]
    stop = whole.text[clean[0] : clean[0] + 3]
    cut = await answer(engine, request("Hello fox", max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


async def test_the_end_token_ends_the_answer_and_has_no_text(world: World, engine: Engine) -> None:
    end = world.reference.tokenizer.eos_token_id
    for seed in range(200):
        got = await answer(engine, request("Hello", temperature=2.0, seed=seed, max_tokens=60))
        if got.finish_reason == "stop":
            break
    assert got.token_ids[-1] == end
    assert end not in got.token_ids[:-1]
    assert "<|im_end|>" not in got.text


async def test_a_slow_reader_gets_joined_deltas_with_nothing_lost(world: World, engine: Engine) -> None:
    asked = request("Hello fox", max_tokens=60, ignore_eos=True, logprobs=True)
    prompt = await answer(engine, asked)
    got, num_deltas = Answer(), 0
    async for delta in engine.generate(asked):
        assert isinstance(delta, Delta)
        got.add(delta)
        num_deltas += 1
        # Another request runs to its end before this reader looks again.
        await answer(engine, request("dog", max_tokens=10, ignore_eos=True))
    assert (got.text, got.token_ids, got.logprobs) == (
        prompt.text,
        prompt.token_ids,
        pytest.approx(prompt.logprobs, abs=1e-4),
    )
    assert num_deltas < 40
