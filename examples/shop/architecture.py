"""What the practice dummy is made of: its tokenizer, its processor and its untrained network.

An Idefics3 with a small SigLIP tower and a Llama text tower, because transformers, TRL and vLLM all
run that with LoRA and its image processor needs no torchvision. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from examples.shop.pictures import SIZE

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

PATCH = 8
SHUFFLE = 4
"""Patches a side that the connector folds into one image token."""
IMAGE_TOKENS = (SIZE // PATCH // SHUFFLE) ** 2
CONTEXT = 2048
VOCABULARY = 1100

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SPECIAL = (PAD, IM_START, IM_END, "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
_MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<data>", "</data>")
_PIECES = Regex(r"\n| ?\p{L}+|\p{N}|[^\p{L}\p{N}\n]+")
"""A newline, a word, a digit, or a run of signs: BPE merges within a piece only."""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that encodes any text; the usual words of `texts` are one token each, and so is a digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    markup = [AddedToken(token, special=False, normalized=False) for token in _MARKUP]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(markup),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(markup)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.read_text(),
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The processor: pictures of any size become SIZE by SIZE pixels and IMAGE_TOKENS tokens."""
    edge = {"longest_edge": SIZE}
    image_processor = Idefics3ImageProcessorPil(
        size=edge,
        max_image_size=edge,
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE.read_text()
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The network with fresh weights from torch's current seed, float32."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        initializer_range=0.04,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=eos,
    )
    vision = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    config = Idefics3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    model.generation_config.bos_token_id = None
    return model
