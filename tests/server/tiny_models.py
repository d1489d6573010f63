"""Tiny models with random weights for the engine's tests: made on the spot, nothing downloaded.

Weights are drawn wider than usual, so that logits are well apart and greedy paths do not hang on the
last bit. Each function writes a Hugging Face folder and returns it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image as PillowImage
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

CONTEXT = 512
PATCH_PICTURE = 32
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
    *("<global-img>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_TEXTS = [
    "You are a helpful assistant who answers questions about apples, prices and pictures.",
    "What is the price of seven red apples and three green pears? How many are left?",
    "The quick brown fox jumps over the lazy dog while the grey cat sleeps.",
    "Tools: add(a, b) look_up(name) count(colour)",
]
_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}IMAGE{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if tools -%}{{ 'Tools: ' + tools | map(attribute='function.name') | join(' ') + '\n' }}{%- endif -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


def make_tokenizer(image_mark: str = "", *, call_marks: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens with a ChatML template; `image_mark` stands for an image.

    With `call_marks` the marks of a tool call are tokens of their own, added but not special, as Qwen's are.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in _SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    if call_marks:
        marks = ("<tool_call>", "</tool_call>", "<think>", "</think>")
        tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=_TEMPLATE.replace("IMAGE", image_mark),
    )


def make_qwen2(folder: Path, *, call_marks: bool = False, **changes: Any) -> Path:
    """A text model with grouped-query attention."""
    tokenizer = make_tokenizer(call_marks=call_marks)
    config = Qwen2Config(**{**_text(tokenizer), **changes})
    return _save(Qwen2ForCausalLM(config), folder, tokenizer)


def make_idefics3(folder: Path) -> Path:
    """A vision model whose processor needs no torchvision: SigLIP tower, Llama text."""
    tokenizer = make_tokenizer("<image>")
    text = {**_text(tokenizer), "model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        text_config=text,
        vision_config={**vision, "image_size": PATCH_PICTURE, "patch_size": 8, "initializer_range": 0.3},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    edge = {"longest_edge": PATCH_PICTURE}
    image_processor = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    _save(Idefics3ForConditionalGeneration(config), folder, tokenizer)
    processor.save_pretrained(folder)
    return folder


def make_qwen2_vl(folder: Path) -> Path:
    """A vision model with three-dimensional rotary positions; its processor cannot be built without torchvision."""
    tokenizer = make_tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2VLConfig(
        text_config={**_text(tokenizer), "rope_parameters": rope},
        vision_config={
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.3,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    _save(Qwen2VLForConditionalGeneration(config), folder, tokenizer)
    Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64).save_pretrained(folder)
    return folder


def make_adapter(model_folder: Path, folder: Path, seed: int, **changes: Any) -> Path:
    """A LoRA adapter with random weights, saved by peft."""
    torch.manual_seed(seed)
    vision = (model_folder / "preprocessor_config.json").exists() or (model_folder / "processor_config.json").exists()
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r".*(text_model|language_model|model)\.layers.*(q_proj|v_proj|o_proj|down_proj)",
        "init_lora_weights": False,
        **changes,
    }
    wrapped = get_peft_model(auto.from_pretrained(model_folder), LoraConfig(**settings))
    wrapped.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = PATCH_PICTURE, height: int = PATCH_PICTURE) -> bytes:
    """PNG bytes of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "initializer_range": 0.25,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _save(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
