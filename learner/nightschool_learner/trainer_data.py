"""Preference pairs as token ids: exactly the tokens that were served, and batches of them.

A prompt is rendered through the model's chat template with the generation prompt, as the engine does; an
answer is the sampled tokens, or, where none were kept, its text's tokens and the end of the turn. TRL's own
preparation would render prompt and answer together and train on what the template puts after an answer, which
nobody sampled (peers lost runs to such differences: SkyRL#123, slime#117, rllm#272).

Rows with and without images share batches: images are flattened over the batch, in the order of their
placeholders, which is how vision-language models consume them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from nightschool_server.chat import ToolSpec, messages_from_json, template_messages, template_tools
from PIL import Image
from torch import Tensor

from nightschool_learner.manifest import ProbePrompt

TEXT_KEYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
"""What a processor returns one value a token for; everything else it returns is about images."""


@dataclass(frozen=True)
class Encoded:
    """A rendered prompt."""

    ids: list[int]
    mm_token_type_ids: list[int] | None
    """Per token 0 for text, 1 for image; None where the model does not ask."""


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The rows of a pairs file, see `pair_export.py`."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def render_prompt(processor: Any, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
    """The prompt's text as the engine renders it, placeholders of images not yet expanded."""
    return str(
        processor.apply_chat_template(list(messages), tools=tools or None, add_generation_prompt=True, tokenize=False)
    )


def encode_prompt(processor: Any, text: str, images: Sequence[Image.Image]) -> Encoded:
    """The prompt's tokens, image placeholders expanded."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not images:
        return Encoded(list(tokenizer(text, add_special_tokens=False)["input_ids"]), None)
    encoded = processor(text=[text], images=[list(images)], add_special_tokens=False)
    kinds = encoded.get("mm_token_type_ids")
    return Encoded(_list(encoded["input_ids"][0]), None if kinds is None else _list(kinds[0]))


def encode_answer(tokenizer: Any, text: str, sampled: Sequence[int]) -> list[int]:
    """The answer's tokens: as sampled where known, else its text's and the end of the turn."""
    if sampled:
        return list(sampled)
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode_pairs(
    processor: Any, rows: Sequence[Mapping[str, Any]], blobs: Path, max_length: int
) -> list[dict[str, Any]]:
    """The rows as the collator reads them; rows longer than `max_length` tokens are left out."""
    tokenizer = getattr(processor, "tokenizer", processor)
    encoded = []
    for row in rows:
        text = render_prompt(processor, row["prompt"], row.get("tools"))
        prompt = encode_prompt(processor, text, [open_image(blobs, sha256) for sha256 in row["images"]])
        answers = {
            f"{side}_ids": encode_answer(tokenizer, row[side][0]["content"], row.get(f"{side}_token_ids") or ())
            for side in ("chosen", "rejected")
        }
        if len(prompt.ids) + max(map(len, answers.values())) > max_length:
            continue
        encoded.append(
            {"prompt_ids": prompt.ids, **answers, "prompt_text": text, "pictures": list(row["images"])}
            | {"mm_token_type_ids": prompt.mm_token_type_ids or []}
        )
    return encoded


def open_image(blobs: Path, sha256: str) -> Image.Image:
    """The image of a blob, in RGB."""
    return Image.open(BytesIO((blobs / sha256[:2] / sha256).read_bytes())).convert("RGB")


@dataclass(frozen=True)
class PairCollator:
    """Makes TRL's DPO batch: the chosen sequences first, then the rejected, padded on the right."""

    processor: Any
    blobs: Path
    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch: ids and masks [2 * num_pairs, length], images flattened in sequence order."""
        sequences = [(e, e["chosen_ids"]) for e in examples] + [(e, e["rejected_ids"]) for e in examples]
        batch = {
            "input_ids": self._pad([e["prompt_ids"] + answer for e, answer in sequences], self.pad_token_id),
            "attention_mask": self._pad([[1] * (len(e["prompt_ids"]) + len(answer)) for e, answer in sequences], 0),
            "completion_mask": self._pad(
                [[0] * len(e["prompt_ids"]) + [1] * len(answer) for e, answer in sequences], 0
            ),
        }
        if any(e.get("mm_token_type_ids") for e in examples):
            kinds = [e["mm_token_type_ids"] or [0] * len(e["prompt_ids"]) for e, _ in sequences]
            batch["mm_token_type_ids"] = self._pad(
                [kind + [0] * len(answer) for kind, (_, answer) in zip(kinds, sequences, strict=True)], 0
            )
        for side in ("ref_chosen_logps", "ref_rejected_logps"):
            if side in examples[0]:
                batch[side] = torch.tensor([e[side] for e in examples])
        return batch | self._image_tensors([e for e, _ in sequences if e["pictures"]])

    def _image_tensors(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not examples:
            return {}
        encoded = self.processor(
            text=[e["prompt_text"] for e in examples],
            images=[[open_image(self.blobs, sha256) for sha256 in e["pictures"]] for e in examples],
            add_special_tokens=False, padding=True, return_tensors="pt",
        )  # fmt: skip
        return {key: value for key, value in encoded.items() if key not in TEXT_KEYS}

    @staticmethod
    def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def score_text(model: Any, processor: Any, probe: ProbePrompt) -> list[float]:
    """Logprobs [num_tokens] of a text-only probe's continuation, the end of the turn not included."""
    tools = tuple(ToolSpec(t["name"], t["description"], t["parameters"]) for t in probe.tools)
    text = render_prompt(processor, template_messages(messages_from_json(probe.messages)), template_tools(tools))
    tokenizer = getattr(processor, "tokenizer", processor)
    prompt = encode_prompt(processor, text, ()).ids
    answer = list(tokenizer(probe.continuation, add_special_tokens=False)["input_ids"])
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + answer], device=model.device)).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return [float(logprobs[position, token]) for position, token in enumerate(answer)]


def _list(values: Any) -> list[int]:
    return [int(value) for value in values]
