"""The model and the adapters of the serving benchmarks, made on the spot: random weights, nothing downloaded.

Every token but printable ASCII has a zero row in the output layer, so that a greedy answer never picks it: each token
is text of its own (pieces can be timed alike on every side), and the end token does not come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.engine import load
from tests.server.tiny_models import make_tokenizer

CONTEXT = 1024
MODEL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_model(folder: Path, *, dtype: torch.dtype = torch.bfloat16, std: float = 0.02) -> Path:
    """A Qwen2 of 4 layers and width 256; wide weights (`std`) keep greedy paths apart from the last bit."""
    torch.manual_seed(7)
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **MODEL,
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    silent = [i for i in range(len(tokenizer)) if not _is_text(tokenizer.decode([i]))]
    with torch.no_grad():
        model.lm_head.weight[silent] = 0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(model: str | Path, folder: Path, seed: int, *, rank: int = 64, alpha: int = 16) -> Path:
    """An adapter with random weights on every Linear of the text layers."""
    torch.manual_seed(seed)
    targets = r".*(text_model|language_model|model)\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    get_peft_model(load(str(model)), config).save_pretrained(folder)
    return folder


def _is_text(text: str) -> bool:
    return text.isascii() and text.isprintable() and "<" not in text
