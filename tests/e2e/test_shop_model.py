"""The shop example and its practice dummy: what is committed is what its sources make, and it fits its prompts."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from nightschool_learner.prompts import TEMPLATES_DIGEST
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import load_app, load_evaluation
from nightschool_server.chat import template_tools

from examples.shop import catalogue, held_out
from examples.shop.architecture import CHAT_TEMPLATE
from examples.shop.demonstrations import CORRUPTED, right_steps, slip, taught_error, wrong_steps
from examples.shop.dummy import MODEL, Dummy, load
from examples.shop.families import FAMILIES, PICTURE_FAMILIES, Split, make_task
from examples.shop.lessons import agent_lesson, any_lesson, make_lesson
from examples.shop.rollouts import execute, run_all
from examples.shop.toolbox import TOOLS
from examples.shop.traffic import traffic
from examples.shop.train_model import IGNORE, collate, loss_of, prompts_digest

RETRAIN = "the prompts changed: python -m examples.shop.train_model --out examples/shop/model"


@cache
def dummy() -> Dummy:
    return load()


def training() -> dict[str, str]:
    record: dict[str, str] = json.loads((MODEL / "training.json").read_text())
    return record


def test_the_model_was_trained_on_the_prompts_of_today() -> None:
    assert training()["templates_digest"] == TEMPLATES_DIGEST, RETRAIN
    assert training()["prompts_digest"] == prompts_digest(), RETRAIN
    assert (MODEL / "chat_template.jinja").read_text() == CHAT_TEMPLATE.read_text(), RETRAIN


def test_the_committed_weights_are_safetensors_of_at_most_12_mb() -> None:
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) <= 12_000_000
    assert not list(MODEL.glob("*.bin"))


def test_the_dummy_has_headroom_greedily() -> None:
    torch.manual_seed(0)
    episodes = run_all(dummy(), held_out.held_out())
    assert len(episodes) >= 400
    assert 0.50 <= sum(episode.solved for episode in episodes) / len(episodes) <= 0.65


def test_the_application_loads_and_its_held_out_tasks_are_the_generators() -> None:
    app = load_app("examples.shop.app:app")
    tasks = load_evaluation(app).tasks
    made = held_out.held_out()
    assert [(t.family, t.prompt, t.answer, t.match) for t in tasks] == [
        (t.family, t.prompt, t.answer, t.match) for t in made
    ]
    assert [path.read_bytes() for task in tasks for path in task.images] == [t.picture for t in made if t.picture]


def test_the_committed_catalogue_is_the_one_that_is_built(tmp_path: Path) -> None:
    catalogue.build(tmp_path / "catalogue.db")
    built, committed = (tmp_path / "catalogue.db").read_bytes(), catalogue.CATALOGUE.read_bytes()
    header = 100  # holds the version of the SQLite library that wrote it
    assert built[header:] == committed[header:]


def test_held_out_tasks_and_pictures_are_in_neither_traffic_nor_training() -> None:
    kept = {(task.prompt, task.picture) for task in held_out.held_out()}
    pictures = {task.picture for task in held_out.held_out() if task.picture}
    rng = random.Random(3)
    splits: tuple[Split, ...] = ("training", "traffic")
    others = [make_task(family, split, rng) for split in splits for family in FAMILIES for _ in range(300)]
    assert not kept & {(task.prompt, task.picture) for task in others}
    assert not pictures & {task.picture for task in others}


def test_traffic_is_seeded_and_never_asks_twice() -> None:
    first, again = (list(itertools.islice(traffic(5), 200)) for _ in range(2))
    assert first == again
    assert len({(request.prompt, request.images) for request in first}) == 200
    assert {request.family for request in first} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_steps_run_and_solve_and_errors_do_not(family: str) -> None:
    rng = random.Random(family)
    for _ in range(50):
        task = make_task(family, "training", rng)
        basket: dict[str, int] = {}
        for position, step in enumerate(right_steps(task)):
            assert slip(task, position, rng).action != step.action
            assert execute(step.action, basket) == step
        assert task.is_solved_by(right_steps(task)[-1].action)
        if family in CORRUPTED:
            assert sum(taught_error(task, position) is not None for position in range(len(right_steps(task)))) == 1
            assert wrong_steps(task) != right_steps(task)


def test_pictures_are_shown_where_the_family_needs_them() -> None:
    rng = random.Random(0)
    for family in FAMILIES:
        assert (make_task(family, "training", rng).picture is not None) == (family in PICTURE_FAMILIES)


def test_the_tokenizer_encodes_any_text_and_keeps_digits_and_verdicts_whole() -> None:
    tokenizer = dummy().tokenizer
    odd = "naïve 你好 🙂\t<tool_call> 1234"
    assert tokenizer.decode(tokenizer.encode(odd), skip_special_tokens=True) == odd
    assert len(tokenizer.encode("4096")) == 4
    assert [len(tokenizer.encode(verdict)) for verdict in "AB"] == [1, 1]


def test_the_template_writes_tool_calls_as_the_model_does() -> None:
    arguments = {"item": "red mug", "quantity": 2}
    parts = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "reserve", "arguments": arguments}}]},
        {"role": "tool", "name": "reserve", "content": "2"},
    ]
    text = dummy().tokenizer.apply_chat_template(
        parts, tools=template_tools(TOOLS), tokenize=False, add_generation_prompt=True
    )
    assert f"<|im_start|>assistant\n{write_call('reserve', arguments)}<|im_end|>\n" in text
    assert "<tool_response>2</tool_response>" in text
    assert "reserve(item, quantity)" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_the_processor_expands_pictures_as_training_did() -> None:
    rng = random.Random(2)
    lesson = next(lesson for lesson in iter(lambda: make_lesson("writer", rng), None) if len(lesson.pictures) == 2)
    from io import BytesIO

    from nightschool_server.chat import template_messages
    from PIL import Image

    processor = dummy().processor
    text = processor.apply_chat_template(template_messages(lesson.messages), tokenize=False)
    images = [Image.open(BytesIO(picture)) for picture in lesson.pictures]
    inputs = processor(text=[text], images=[images], return_tensors="pt")
    batch = collate([lesson], processor)
    assert torch.equal(inputs["input_ids"], batch.tokens)
    assert batch.images is not None
    torch.testing.assert_close(inputs["pixel_values"], batch.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("families", [("sum", "total", "price"), ("count", "colour", "tag"), ("tag", "tag", "stock")])
def test_sharing_the_prefix_changes_neither_loss_nor_gradient(families: tuple[str, ...]) -> None:
    rng = random.Random(4)
    model = dummy().model
    batch = collate([agent_lesson(make_task(family, "training", rng), rng) for family in families], dummy().processor)
    shared = loss_of(model, batch)
    shared.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    spoken = batch.labels != IGNORE
    hidden = model.model(input_ids=batch.tokens, pixel_values=batch.images).last_hidden_state[:, :-1][spoken]
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), batch.labels[spoken], reduction="none")
    weights = (spoken / spoken.sum(1, keepdim=True).sqrt())[spoken]
    plain = (losses * weights).sum() / weights.sum()
    plain.backward()
    torch.testing.assert_close(shared, plain)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, atol=1e-5, rtol=1e-4)
    model.zero_grad()


def test_lessons_are_seeded() -> None:
    digests = []
    for _ in range(2):
        rng = random.Random(6)
        digests.append(hashlib.sha256(repr([any_lesson(rng) for _ in range(50)]).encode()).hexdigest())
    assert digests[0] == digests[1]
