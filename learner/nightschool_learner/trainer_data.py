"""Preference pairs as token ids: exactly the tokens that were served, and batches of them.

A prompt is rendered by the engine's own renderer; an answer is the sampled tokens, or, where none were kept, its
text's tokens and the end of the turn. TRL's own preparation would render prompt and answer together and train
on what the template puts after an answer, which nobody sampled (peers lost runs to such differences: SkyRL#123,
slime#117, rllm#272).

Rows with and without images share batches: images are flattened over the batch, in the order of their
placeholders, which is how vision-language models consume them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nightschool_server.chat import (
    Image,
    Message,
    Part,
    Text,
    ToolCall,
    ToolResult,
    ToolSpec,
    canonical_json,
    messages_from_json,
)
from nightschool_server.engine import Prompt
from nightschool_server.engines.rendering import Renderer
from torch import Tensor
from torch.nn import functional

from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import ProbePrompt

ANCHORS = "anchors"
"""Name of the dataset's column, and of the part of a batch, that holds anchors."""


@dataclass(frozen=True)
class EncodedPair:
    """A preference as tokens."""

    prompt: Prompt
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    is_image: list[int]
    """For each token of the prompt: 1 where it is an image's placeholder."""

    @property
    def num_tokens(self) -> int:
        """Of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class EncodedAnchor:
    """A prompt and the answer whose likelihood is kept, as tokens."""

    prompt: Prompt
    prompt_ids: list[int]
    answer_ids: list[int]
    is_image: list[int]
    """As in a pair."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def read_rows(path: Path, sha256: str) -> list[dict[str, Any]]:
    """The rows of a file of pairs or anchors, see `pair_export.py`. Raises StageFailedError where it has changed."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise StageFailedError(
            f"{path} has sha256 {digest[:12]}, the manifest says {sha256[:12]}: the file changed after the run began"
        )
    return [json.loads(line) for line in data.decode().splitlines() if line.strip()]


def encode_pair(renderer: Renderer, row: Mapping[str, Any], blobs: Path, eos_id: int) -> EncodedPair:
    """One row of a pairs file as tokens."""
    prompt, prompt_ids, is_image = _encode_prompt(renderer, row, blobs)
    chosen, rejected = (_answer(renderer, row, side, eos_id) for side in ("chosen", "rejected"))
    return EncodedPair(prompt, prompt_ids, chosen, rejected, is_image)


def encode_answer(
    renderer: Renderer, row: Mapping[str, Any], blobs: Path, eos_id: int, *, side: str = "answer"
) -> EncodedAnchor:
    """One row of an anchors file, or of callers' feedback (side `completion`), as tokens."""
    prompt, prompt_ids, is_image = _encode_prompt(renderer, row, blobs)
    return EncodedAnchor(prompt, prompt_ids, _answer(renderer, row, side, eos_id), is_image)


def parse_messages(rows: Sequence[Mapping[str, Any]], images: Sequence[str]) -> tuple[Message, ...]:
    """The messages that `chat.template_messages` wrote, for rendering: ids that no template is shown are lost."""
    names = iter(images)
    return tuple(Message(row["role"], tuple(_parts(row, names))) for row in rows)


def parse_tools(rows: Sequence[Mapping[str, Any]] | None) -> tuple[ToolSpec, ...]:
    """The tools that `chat.template_tools` wrote."""
    functions = [row["function"] for row in rows or ()]
    return tuple(ToolSpec(f["name"], f["description"], canonical_json(f["parameters"])) for f in functions)


@dataclass(frozen=True)
class PairCollator:
    """Makes TRL's DPO batch: the chosen sequences first, then the rejected, padded on the right.

    Under ANCHORS stands a batch of the same form of the anchors that go with these pairs, where there are any.
    """

    pairs: Sequence[EncodedPair]
    anchors: Sequence[EncodedAnchor]
    renderer: Renderer
    pad_id: int
    marks_images: bool
    """Whether the model's forward takes `mm_token_type_ids`, as those with multimodal positions do."""

    @classmethod
    def of(
        cls,
        pairs: Sequence[EncodedPair],
        renderer: Renderer,
        pad_id: int,
        model: Any,
        anchors: Sequence[EncodedAnchor] = (),
    ) -> PairCollator:
        """The collator for a model."""
        marks_images = "mm_token_type_ids" in inspect.signature(model.forward).parameters
        return cls(pairs, anchors, renderer, pad_id, marks_images)

    def dataset_rows(
        self, pairs: Sequence[int] | None = None, anchors: Sequence[int] | None = None
    ) -> dict[str, list[Any]]:
        """The columns of a dataset of some pairs (None: all): their indices, and the anchors dealt to them in turn."""
        pairs = range(len(self.pairs)) if pairs is None else pairs
        anchors = range(len(self.anchors)) if anchors is None else anchors
        return {"row": list(pairs), ANCHORS: [list(anchors[i :: len(pairs)]) for i in range(len(pairs))]}

    def prompts(self, pairs: Sequence[int]) -> list[dict[str, Tensor]]:
        """The prompt of each of these pairs as a batch of its own, each prompt once."""
        distinct = {tuple(self.pairs[i].prompt_ids): self.pairs[i] for i in pairs}
        batches = [self.pad_sequences([(pair, [])]) for pair in distinct.values()]
        return [{key: value for key, value in batch.items() if key != "completion_mask"} for batch in batches]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of rows of the dataset: ids and masks [2 * num_pairs, length], images flat."""
        pairs = [self.pairs[row["row"]] for row in rows]
        sequences = [(pair, pair.chosen_ids) for pair in pairs] + [(pair, pair.rejected_ids) for pair in pairs]
        batch: dict[str, Any] = self.pad_sequences(sequences)
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in rows[0]:
                batch[key] = torch.tensor([row[key] for row in rows])
        if anchors := [self.anchors[i] for row in rows for i in row.get(ANCHORS, ())]:
            batch[ANCHORS] = self.pad_sequences([(anchor, anchor.answer_ids) for anchor in anchors])
        return batch

    def pad_sequences(self, sequences: Sequence[tuple[EncodedPair | EncodedAnchor, list[int]]]) -> dict[str, Tensor]:
        batch = {
            "input_ids": _pad([row.prompt_ids + answer for row, answer in sequences], self.pad_id),
            "attention_mask": _pad([[1] * (len(row.prompt_ids) + len(answer)) for row, answer in sequences], 0),
            "completion_mask": _pad([[0] * len(row.prompt_ids) + [1] * len(answer) for row, answer in sequences], 0),
        }
        pictures = [p for row, _ in sequences if row.prompt.images for p in self.renderer.render(row.prompt).pictures]
        if pictures and self.marks_images:
            batch["mm_token_type_ids"] = _pad([row.is_image + [0] * len(answer) for row, answer in sequences], 0)
        return batch | join_images([picture.inputs for picture in pictures])


def join_images(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of images from batches of one. Where shapes differ, zeros fill up, which models take as no image."""
    if not images:
        return {}
    return {name: _join([image[name] for image in images]) for name in images[0]}


def score_text(model: Any, renderer: Renderer, probe: ProbePrompt) -> list[float]:
    """Logprobs [num_tokens] of a text-only probe's continuation, the end of the turn not included."""
    tools = tuple(ToolSpec(t["name"], t["description"], t["parameters"], t.get("strict", False)) for t in probe.tools)
    prompt = renderer.render(Prompt(messages_from_json(probe.messages), tools)).token_ids.tolist()
    answer = renderer.tokenise(probe.continuation).tolist()
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + answer], device=model.device)).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return [float(logprobs[position, token]) for position, token in enumerate(answer)]


def _encode_prompt(renderer: Renderer, row: Mapping[str, Any], blobs: Path) -> tuple[Prompt, list[int], list[int]]:
    """A row's prompt, its tokens, and which of them are an image's placeholders."""
    images = {sha256: (blobs / sha256[:2] / sha256).read_bytes() for sha256 in row["images"]}
    prompt = Prompt(parse_messages(row["prompt"], row["images"]), parse_tools(row.get("tools")), images)
    rendered = renderer.render(prompt)
    return prompt, rendered.token_ids.tolist(), (rendered.keys < 0).astype(int).tolist()


def _answer(renderer: Renderer, row: Mapping[str, Any], side: str, eos_id: int) -> list[int]:
    """As sampled where that is known, else the text's tokens and the end of the turn."""
    sampled = row.get(f"{side}_token_ids")
    return list(sampled) if sampled else [*renderer.tokenise(row[side][0]["content"]).tolist(), eos_id]


def _parts(row: Mapping[str, Any], images: Any) -> list[Part]:
    content = row["content"]
    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if row["role"] == "tool":
        shown = tuple(next(images) for piece in pieces if piece["type"] == "image")
        text = "".join(piece["text"] for piece in pieces if piece["type"] == "text")
        return [ToolResult(row.get("tool_call_id", ""), row.get("name", ""), text, images=shown)]
    parts: list[Part] = [Image(next(images)) if p["type"] == "image" else Text(p["text"]) for p in pieces]
    for call in row.get("tool_calls") or ():
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        parts.append(ToolCall(call.get("id", ""), function["name"], arguments))
    return parts


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _join(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(t.shape[i] for t in tensors) for i in range(1, tensors[0].ndim)]
    filled = [
        functional.pad(t, [n for i in reversed(range(1, t.ndim)) for n in (0, shape[i - 1] - t.shape[i])])
        for t in tensors
    ]
    return torch.cat(filled)
