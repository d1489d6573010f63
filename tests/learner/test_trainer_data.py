"""That the trainer trains on the tokens that are served, pictures included, whatever shares a batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from nightschool_learner.trainer_data import (
    EncodedPair,
    PairCollator,
    encode_pair,
    join_images,
    parse_messages,
    parse_tools,
)
from nightschool_learner.trainer_model import load_base
from nightschool_server.chat import (
    Message,
    Text,
    ToolCall,
    ToolResult,
    assistant,
    system,
    template_messages,
    template_tools,
    tool_result,
    user,
)
from nightschool_server.engine import GenerateRequest, Prompt, Sampling
from nightschool_server.engines.loading import LoadedModel
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig
from transformers import AutoProcessor

from tests.learner.training_data import CALCULATOR, MODEL, picture_pair, text_pair


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return load_base(str(MODEL))


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Three text rows and two picture rows, mixed."""
    rng = random.Random(0)
    text = [text_pair(rng), text_pair(rng, second_step=True), text_pair(rng)]
    pictures = [picture_pair(rng, tmp_path, colours=colours) for colours in (("red", "blue"), ("blue", "red"))]
    return [text[0], pictures[0], text[1], pictures[1], text[2]]


def encode(base: LoadedModel, rows: list[dict[str, Any]], blobs: Path) -> list[EncodedPair]:
    return [encode_pair(base.renderer, row, blobs, base.tokenizer.eos_token_id) for row in rows]


def sequence_logprobs(base: LoadedModel, batch: dict[str, torch.Tensor]) -> list[float]:
    """Summed logprob of each sequence's answer."""
    inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
    with torch.inference_mode():
        logits = base.parts.model(**inputs).logits[:, :-1].log_softmax(-1)
    picked = logits.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return [float(value) for value in (picked * batch["completion_mask"][:, 1:]).sum(1)]


def test_prompt_tokens_are_those_of_the_models_own_processor(
    base: LoadedModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    from PIL import Image

    processor = AutoProcessor.from_pretrained(MODEL)
    for row, pair in zip(rows, encode(base, rows, tmp_path), strict=True):
        text = processor.apply_chat_template(
            row["prompt"], tools=row["tools"], add_generation_prompt=True, tokenize=False
        )
        images = [Image.open(tmp_path / sha[:2] / sha).convert("RGB") for sha in row["images"]]
        expected = processor(text=[text], images=[images] if images else None, add_special_tokens=False)["input_ids"][0]
        assert pair.prompt_ids == list(expected)
        assert sum(pair.is_image) == (processor.image_seq_len if images else 0)


async def test_tokens_are_those_that_the_engine_sampled(
    base: LoadedModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    engine = await TransformersEngine.start(TransformersEngineConfig(str(MODEL), num_slots=4))
    try:
        for row in rows:
            pair = encode(base, [row], tmp_path)[0]
            request = GenerateRequest("r", pair.prompt, Sampling(max_tokens=40, temperature=1.0, seed=5))
            deltas = [delta async for delta in engine.generate(request)]
            assert deltas[-1].num_prompt_tokens == len(pair.prompt_ids)
            sampled = [token for delta in deltas for token in delta.token_ids]
            said = "".join(delta.text for delta in deltas)
            served = {**row, "chosen": [{"role": "assistant", "content": said}], "chosen_token_ids": sampled}
            assert encode(base, [served], tmp_path)[0].chosen_ids == sampled
            if deltas[-1].finish_reason == "stop":
                assert sampled[-1] == base.tokenizer.eos_token_id
    finally:
        await engine.close()


def test_without_sampled_tokens_an_answer_is_its_text_and_the_end_of_the_turn(
    base: LoadedModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    for row, pair in zip(rows, encode(base, rows, tmp_path), strict=True):
        assert base.tokenizer.decode(pair.chosen_ids[:-1]) == row["chosen"][0]["content"]
        assert base.tokenizer.decode(pair.rejected_ids[:-1]) == row["rejected"][0]["content"]
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == base.tokenizer.eos_token_id


def test_a_mixed_batch_gives_what_each_row_gives_alone(
    base: LoadedModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pairs = encode(base, rows, tmp_path)
    collate = PairCollator.of(pairs, base.renderer, base.tokenizer.pad_token_id, base.parts.model)
    together = sequence_logprobs(base, collate([{"row": i} for i in range(5)]))
    for index in range(5):
        alone = sequence_logprobs(base, collate([{"row": index}]))
        assert [together[index], together[5 + index]] == pytest.approx(alone, abs=1e-3)


def test_pictures_matter_and_follow_their_rows(base: LoadedModel, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pairs = encode(base, [rows[1], rows[3]], tmp_path)
    collate = PairCollator.of(pairs, base.renderer, base.tokenizer.pad_token_id, base.parts.model)
    batch = collate([{"row": 0}, {"row": 1}])
    assert batch["pixel_values"].shape[0] == 4
    assert torch.equal(batch["pixel_values"][:2], batch["pixel_values"][2:])
    swapped = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert sequence_logprobs(base, batch) != pytest.approx(sequence_logprobs(base, swapped), abs=1e-5)


def test_batches_without_pictures_carry_no_pixels(
    base: LoadedModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pairs = encode(base, rows, tmp_path)
    collate = PairCollator.of(pairs, base.renderer, base.tokenizer.pad_token_id, base.parts.model)
    assert set(collate([{"row": 0}, {"row": 2}])) == {"input_ids", "attention_mask", "completion_mask"}


def test_only_the_answers_tokens_are_trained_on(base: LoadedModel, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pairs = encode(base, rows, tmp_path)
    collate = PairCollator.of(pairs, base.renderer, base.tokenizer.pad_token_id, base.parts.model)
    batch = collate([{"row": i} for i in range(5)])
    answers = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    for ids, mask, attended, answer in zip(
        batch["input_ids"], batch["completion_mask"], batch["attention_mask"], answers, strict=True
    ):
        assert ids[mask.bool()].tolist() == answer
        assert int(attended.sum()) == len(ids) - int((1 - attended).sum())
        assert not bool((mask & ~attended.bool()).any())


def test_reference_logprobs_ride_along(base: LoadedModel, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pairs = encode(base, rows, tmp_path)
    collate = PairCollator.of(pairs, base.renderer, base.tokenizer.pad_token_id, base.parts.model)
    batch = collate([{"row": 0, "ref_chosen_logps": -3.5, "ref_rejected_logps": -7.25}])
    assert (batch["ref_chosen_logps"].tolist(), batch["ref_rejected_logps"].tolist()) == ([-3.5], [-7.25])


def test_images_of_different_shapes_are_filled_up_with_zeros() -> None:
    small, large = torch.ones(1, 1, 3, 4, 4), torch.full((1, 2, 3, 4, 6), 2.0)
    joined = join_images([{"pixel_values": small}, {"pixel_values": large}])["pixel_values"]
    assert joined.shape == (2, 2, 3, 4, 6)
    assert torch.equal(joined[:1, :1, :, :, :4], small)
    assert int((joined[0] != 0).sum()) == small.numel()
    assert torch.equal(joined[1:], large)


def test_patches_of_a_grid_are_strung_together() -> None:
    grids = [
        {"pixel_values": torch.ones(6, 5), "image_grid_thw": torch.tensor([[1, 2, 3]])},
        {"pixel_values": torch.zeros(4, 5), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    ]
    joined = join_images(grids)
    assert joined["pixel_values"].shape == (10, 5)
    assert joined["image_grid_thw"].tolist() == [[1, 2, 3], [1, 2, 2]]
    assert join_images([]) == {}


def test_template_messages_are_read_back() -> None:
    call = ToolCall("call_0", "calculator", '{"expression": "1 + 2"}')
    messages = (
        system("Be brief."),
        user("Look.", ["a" * 64, "b" * 64]),
        assistant("<tool_call>\n{}\n</tool_call>"),
        Message("assistant", (Text("Well."), call)),
        Message("tool", (ToolResult("call_0", "calculator", "3"),)),
    )
    written = template_messages(messages)
    assert template_messages(parse_messages(written, ["a" * 64, "b" * 64])) == written
    assert parse_messages(written, ["a" * 64, "b" * 64])[:3] == messages[:3]
    assert parse_tools(template_tools([CALCULATOR])) == (CALCULATOR,)
    assert parse_tools(None) == ()
    assert isinstance(Prompt(messages), Prompt)


def test_ids_that_a_template_asks_for_come_back() -> None:
    call = ToolCall("call00000", "price", '{"item": "mug"}')
    messages = (user("?"), Message("assistant", (Text("I look."), call)), tool_result(call, "7"))
    written = template_messages(messages)
    assert (written[1]["tool_calls"][0]["id"], written[2]["tool_call_id"]) == ("call00000", "call00000")
    assert parse_messages(written, []) == messages
