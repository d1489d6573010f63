"""What can be served and what is refused, and what a request may not ask of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import (
    UNSEEN_IMAGE,
    Message,
    Text,
    ToolCall,
    ToolSpec,
    assistant,
    system,
    tool_result,
    user,
)
from nightschool_server.engine import Prompt
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig
from nightschool_server.errors import InvalidRequestError, ModelFormatError
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.server.engine_world import World, answer, pictures, prompt_with, request
from tests.server.tiny_models import make_idefics3, make_qwen2, make_qwen2_vl, make_tokenizer, picture


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module", params=[make_idefics3, make_qwen2_vl])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param(tmp_path_factory.mktemp("seeing") / "model"), {})


def copied(folder: Path, target: Path, edit: Callable[[Path], None]) -> str:
    edit(shutil.copytree(folder, target))
    return str(target)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
LONG = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: (f / "chat_template.jinja").unlink(), r"has no chat template: put a chat_template\.jinja"),
        (edit_config(model_type="qwen3_next", **LINEAR), r"has linear_attention layers, whose state slots cannot hold"),
        (edit_config(**LONG), r"by the longest sequence of a batch \(dynamic\)"),
        (pickled, r"the weights in .* cannot be loaded"),
        (lambda f: (f / "config.json").unlink(), r"config\.json in .* cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json in .* cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), r"the weights in .* cannot be loaded"),
        (edit_config(model_type="bert"), r"the weights in .* lack \d+ tensors .*bert"),
        (edit_config(model_type="siglip"), r"of type 'siglip', neither a causal"),
        (edit_config(intermediate_size=80), r"the weights in .* cannot be loaded"),
    ],
)
async def test_a_model_that_cannot_be_served_is_refused(
    text_folder: Path, tmp_path: Path, edit: Callable[[Path], None], message: str
) -> None:
    folder = copied(text_folder, tmp_path / "model", edit)
    with pytest.raises(ModelFormatError, match=message):
        await TransformersEngine.start(TransformersEngineConfig(model=folder, num_threads=1))


async def test_a_folder_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFormatError, match="folder '/nowhere/model' does not exist"):
        await TransformersEngine.start(TransformersEngineConfig(model="/nowhere/model"))


async def test_attention_that_slots_do_not_know_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, eos_token_id=1,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelFormatError, match="softcap"):
        await TransformersEngine.start(TransformersEngineConfig(model=str(tmp_path), num_threads=1))


async def test_model_info_names_the_files_and_the_template(text_folder: Path, tmp_path: Path) -> None:
    async def info(folder: str | Path, **changes: int) -> object:
        engine = await TransformersEngine.start(TransformersEngineConfig(model=str(folder), num_threads=1, **changes))
        await engine.close()
        return engine.model

    one = await info(text_folder)
    same = await info(copied(text_folder, tmp_path / "same", lambda f: (f / "README.md").write_text("hello")))
    assert (one.digest, one.chat_template_digest) == (same.digest, same.chat_template_digest)
    template = (text_folder / "chat_template.jinja").read_text()
    assert one.chat_template_digest == hashlib.sha256(template.encode()).hexdigest()
    assert (one.context_length, one.accepts_images, one.max_lora_rank) == (512, False, 64)

    def other(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(template + " ")

    changed = await info(copied(text_folder, tmp_path / "other", other), context_length=128)
    assert changed.digest != one.digest
    assert changed.chat_template_digest != one.chat_template_digest
    assert changed.context_length == 128


async def test_images_are_checked_before_anything_runs(seeing: World) -> None:
    good = pictures(1)[0]
    name = hashlib.sha256(good).hexdigest()
    mark = seeing.reference.image_mark
    broken = {
        "no image": prompt_with("Look", b"this is no image"),
        "cut off": prompt_with("Look", good[: len(good) // 2]),
        "empty": prompt_with("Look", b""),
        "bytes missing": Prompt((user("Look", [name]),)),
        "a mark in the text": prompt_with(f"Look {mark}", good),
        "a mark and no image": prompt_with(f"Look {mark}"),
    }
    if mark == "<|image_pad|>":
        broken["a thread"] = prompt_with("Look", picture(1, width=2, height=600))
    async with seeing.engine() as engine:
        for what, prompt in broken.items():
            with pytest.raises(InvalidRequestError) as caught:
                await answer(engine, request(prompt))
            assert caught.value.field == "images", what
        asked = request(prompt_with("Look", good))
        assert (await answer(engine, asked)).token_ids == seeing.reference.greedy(asked.prompt, 24)


async def test_a_text_model_refuses_images(text_folder: Path) -> None:
    async with World(text_folder, {}).engine() as engine:
        with pytest.raises(InvalidRequestError, match="reads text only") as caught:
            await answer(engine, request(prompt_with("Look", *pictures(1))))
        assert caught.value.field == "images"


def after_a_chart(*charts: bytes) -> Prompt:
    """A conversation whose tool has just given back images."""
    named = {hashlib.sha256(data).hexdigest(): data for data in charts}
    call = ToolCall("call_0", "chart", "{}")
    told = (user("Draw."), assistant(write_call("chart", {})), tool_result(call, "the chart", images=list(named)))
    return Prompt(told, (), named)


async def test_a_tools_image_is_an_image_to_the_model(seeing: World) -> None:
    one, other = pictures(1, 2)
    async with seeing.engine() as engine:
        for chart in (one, other):
            asked = request(after_a_chart(chart))
            seen = await answer(engine, asked)
            assert seen.token_ids == seeing.reference.greedy(asked.prompt, 24)
        blind = await answer(engine, request(after_a_chart()))
    assert seen.num_prompt_tokens > blind.num_prompt_tokens, "the image's tokens are in the prompt"


async def test_a_text_model_is_told_of_a_tools_image_in_words(text_folder: Path) -> None:
    in_words = tool_result(ToolCall("call_0", "chart", "{}"), f"{UNSEEN_IMAGE}\nthe chart")
    async with World(text_folder, {}).engine() as engine:
        told = await answer(engine, request(after_a_chart(*pictures(1))))
        asked = Prompt((*after_a_chart().messages[:2], in_words))
        assert (await answer(engine, request(asked))).token_ids == told.token_ids


async def test_messages_that_the_template_refuses_are_the_callers_mistake(text_folder: Path, tmp_path: Path) -> None:
    def strict(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        rule = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        path.write_text(rule + path.read_text())

    folder = Path(copied(text_folder, tmp_path / "strict", strict))
    async with World(folder, {}).engine() as engine:
        with pytest.raises(InvalidRequestError, match="no system role here") as caught:
            await answer(engine, request(Prompt((system("Be brief."), user("Hi")))))
        assert caught.value.field == "messages"
        assert (await answer(engine, request("Hi"))).finish_reason


async def test_a_template_that_reads_only_lists_of_parts_is_given_lists(text_folder: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = copied(
        text_folder, tmp_path / "lists", lambda f: (f / "chat_template.jinja").write_text(template) and None
    )
    plain, lists = World(text_folder, {}), World(Path(folder), {})
    async with plain.engine() as one, lists.engine() as other:
        assert (await answer(one, request("Hello"))).token_ids == (await answer(other, request("Hello"))).token_ids


async def test_tools_reach_the_template(text_folder: Path) -> None:
    world = World(text_folder, {})
    tools = (ToolSpec("add", "adds", '{"type":"object"}'), ToolSpec("look_up", "finds", '{"type":"object"}'))
    asked = request(Prompt((Message("user", (Text("What is 1 + 1?"),)),), tools))
    async with world.engine() as engine:
        got = await answer(engine, asked)
    assert got.token_ids == world.reference.greedy(asked.prompt, 24)
    assert got.token_ids != world.reference.greedy(Prompt(asked.prompt.messages), 24)
