"""The practice dummy in this process: load it, sample from it in batches, ask it for verdicts.

For training and probing alone; the product serves the same folder through its engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.shop.eyes import pixels
from examples.shop.lessons import Lesson, render

MODEL = Path(__file__).with_name("model")
MAX_TOKENS = 48
BATCH = 64


@dataclass(frozen=True)
class Dummy:
    """A model and its processor."""

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer


def load(folder: Path = MODEL) -> Dummy:
    """The dummy in `folder`, float32 on the CPU, for inference."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return Dummy(model, AutoProcessor.from_pretrained(folder))


def sample(dummy: Dummy, prompts: Sequence[Lesson], *, temperature: float = 0.0, top_p: float = 1.0) -> list[str]:
    """One answer to each prompt; greedy at temperature 0."""
    answers: list[str] = []
    options = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    with torch.inference_mode():
        for start in range(0, len(prompts), BATCH):
            inputs = _inputs(dummy, prompts[start : start + BATCH])
            output = dummy.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=temperature > 0, **options)
            new = output[:, inputs["input_ids"].shape[1] :]
            answers.extend(dummy.tokenizer.batch_decode(new, skip_special_tokens=True))
    return answers


def first_logprobs(dummy: Dummy, prompts: Sequence[Lesson], words: Sequence[str]) -> Tensor:
    """[num_prompts, num_words]: the logprob of each word as the answer's first token."""
    ids = [dummy.tokenizer.convert_tokens_to_ids(word) for word in words]
    rows = []
    with torch.inference_mode():
        for start in range(0, len(prompts), BATCH):
            inputs = _inputs(dummy, prompts[start : start + BATCH])
            rows.append(dummy.model(**inputs, logits_to_keep=1).logits[:, -1].log_softmax(-1)[:, ids])
    return torch.cat(rows)


def _inputs(dummy: Dummy, prompts: Sequence[Lesson]) -> dict[str, Tensor]:
    texts = [render(prompt, dummy.processor, generate=True) for prompt in prompts]
    inputs = dict(dummy.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    if pictures:
        inputs["pixel_values"] = pixels(pictures).unsqueeze(0)
    return inputs
