"""One step of the model: a flat row of tokens from many sequences in, sampled tokens and scores out.

Owns the model's forward and the vision features. Prefill chunks and decoding sequences are the same
thing here: tokens of a slot from some offset. No padding: the row [1, num_tokens] holds exactly the
chunks' tokens, sorted by adapter, so that LoRA groups are slices; logits are made only where they are
read. Runs on the owner thread, inside `torch.inference_mode`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nightschool_server.engines.attention import PrefillRun, StepPlan, plan_decode
from nightschool_server.engines.lora import AdapterTable
from nightschool_server.engines.matching import hold
from nightschool_server.engines.pictures import Picture
from nightschool_server.engines.sampling import RowSampling, sample
from nightschool_server.engines.sequences import Chunk, Job, Sequence
from nightschool_server.engines.slots import SlotCache
from nightschool_server.errors import InvalidRequestError

_FEATURE_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Sampled:
    """A new token of a sequence."""

    sequence: Sequence
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None
    """(token id, logprob), likeliest first."""


@dataclass
class StepResult:
    """What a step produced."""

    sampled: list[Sampled] = field(default_factory=list)


@dataclass(frozen=True)
class ModelParts:
    """What the loader found out about the model."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    multimodal_positions: bool
    """Whether positions are [3, batch, tokens]."""
    keeps_logits: bool
    """Whether forward takes `logits_to_keep` as indices."""
    image_inputs: frozenset[str]
    """Arguments of `get_image_features`."""


class Runner:
    """The model, its slots and its adapters."""

    def __init__(self, parts: ModelParts, cache: SlotCache) -> None:
        self.parts = parts
        self.cache = cache
        self.adapters = AdapterTable(parts.model)
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._features_bytes = 0

    def step(self, chunks: Rows[Chunk]) -> StepResult:
        """Compute the chunks' tokens; sample where a sequence's last known token was among them."""
        order = self.adapters.order
        ordered = sorted(chunks, key=lambda c: (order(c.sequence.job.serial), c.end - c.start > 1, c.sequence.slot))
        logits, first_rows = self._forward(ordered)
        result = StepResult()
        generating: list[tuple[Chunk, int]] = []
        for chunk, row in zip(ordered, first_rows, strict=True):
            if chunk.first_logit == chunk.end:
                continue
            if chunk.sequence.job.continuation is not None:
                self._read_scores(chunk, logits[row : row + chunk.end - chunk.first_logit])
            else:
                generating.append((chunk, row))
        if generating:
            whole = len(generating) == logits.shape[0]
            rows = logits if whole else logits[torch.tensor([row for _, row in generating], device=logits.device)]
            result.sampled = _sample([chunk.sequence for chunk, _ in generating], rows)
        return result

    def logits(self, chunks: Rows[Chunk]) -> torch.Tensor:
        """Logits [num_read_positions, vocabulary] of a step, for the self-test."""
        return self._forward(chunks)[0]

    def _forward(self, chunks: Rows[Chunk]) -> tuple[torch.Tensor, list[int]]:
        """Logits of every read position, and each chunk's first row in them."""
        device = self.parts.device
        self.cache.reserve(max(c.sequence.slot for c in chunks) + 1, max(c.end for c in chunks))
        starts = np.cumsum([0, *(c.end - c.start for c in chunks)]).tolist()
        self.cache.cells = self._cells(chunks).to(device)
        input_ids = torch.from_numpy(np.concatenate([c.sequence.ids[c.start : c.end] for c in chunks])[None]).to(device)
        read, first_rows = _read_positions(chunks, starts)
        arguments: dict[str, Any] = {
            "position_ids": self._positions(chunks).to(device),
            "past_key_values": self.cache,
            "use_cache": True,
            "slot_plan": _plan(chunks, starts, device),
        }
        indices = torch.tensor(read, dtype=torch.long, device=device)
        if self.parts.keeps_logits:
            arguments["logits_to_keep"] = indices
        embeds = self._embeds_with_images(chunks, starts, input_ids)
        self.adapters.route([c.sequence.job.serial for c in chunks], starts)
        if embeds is None:
            output = self.parts.model(input_ids=input_ids, **arguments)
        else:
            output = self.parts.model(inputs_embeds=embeds, **arguments)
        logits: torch.Tensor = output.logits[0]
        return (logits if self.parts.keeps_logits else logits[indices]), first_rows

    def _cells(self, chunks: Rows[Chunk]) -> torch.Tensor:
        capacity = self.cache.capacity
        cells = [np.arange(c.start, c.end) + c.sequence.slot * capacity for c in chunks]
        return torch.from_numpy(np.concatenate(cells))

    def _positions(self, chunks: Rows[Chunk]) -> torch.Tensor:
        """[1, num_tokens], or [3, 1, num_tokens] for models with multimodal rotary positions."""
        parts = [c.sequence.positions(c.start, c.end) for c in chunks]
        if not self.parts.multimodal_positions:
            return torch.from_numpy(np.concatenate(parts)[None])
        wide = [p if p.ndim == 2 else np.tile(p, (3, 1)) for p in parts]
        return torch.from_numpy(np.concatenate(wide, axis=1)[:, None])

    def _embeds_with_images(
        self, chunks: Rows[Chunk], starts: Rows[int], input_ids: torch.Tensor
    ) -> torch.Tensor | None:
        """Token embeddings [1, num_tokens, hidden] with image features in place; None in a step of text alone."""
        embeds: torch.Tensor | None = None
        for chunk, offset in zip(chunks, starts, strict=False):
            job = chunk.sequence.job
            low, high = np.searchsorted(job.placeholders, (chunk.start, chunk.end))
            if low == high:
                continue
            if embeds is None:
                embeds = self.parts.model.get_input_embeddings()(input_ids)
            where = torch.from_numpy(job.placeholders[low:high] - chunk.start + offset).to(embeds.device)
            assert job.features is not None, "see() comes before the first step"
            embeds[0, where] = job.features[low:high].to(embeds.dtype)
        return embeds

    def see(self, job: Job) -> None:
        """Run the vision tower over a job's images; raises InvalidRequestError where it cannot read them."""
        try:
            features = torch.cat([self._picture_features(picture) for picture in job.rendered.pictures])
        except Exception as error:
            # An image is a caller's bytes: whatever it does to the tower must not end the engine for others.
            raise InvalidRequestError("images", f"the model cannot read the images: {error}") from error
        if features.shape[0] != len(job.placeholders):
            raise InvalidRequestError(
                "images",
                f"the model makes {features.shape[0]} features of the images where the prompt has "
                f"{len(job.placeholders)} places: send other images",
            )
        job.features = features

    def _picture_features(self, picture: Picture) -> torch.Tensor:
        """[num_placeholders, hidden] from the vision tower, remembered by the image's hash."""
        known = self._features.get(picture.sha256)
        if known is not None:
            self._features.move_to_end(picture.sha256)
            return known
        inputs = {k: v.to(self.parts.device) for k, v in picture.inputs.items() if k in self.parts.image_inputs}
        output = self.parts.model.get_image_features(**inputs)
        pooled = getattr(output, "pooler_output", output)
        if isinstance(pooled, list | tuple):
            pooled = torch.cat([p.reshape(-1, p.shape[-1]) for p in pooled])
        features: torch.Tensor = pooled.reshape(-1, pooled.shape[-1])
        self._features[picture.sha256] = features
        self._features_bytes += features.numel() * features.element_size()
        while self._features_bytes > _FEATURE_CACHE_BYTES and len(self._features) > 1:
            dropped = self._features.popitem(last=False)[1]
            self._features_bytes -= dropped.numel() * dropped.element_size()
        return features

    def _read_scores(self, chunk: Chunk, logits: torch.Tensor) -> None:
        """Append the logprobs of the tokens that follow the chunk's read positions."""
        sequence = chunk.sequence
        following = sequence.ids[chunk.first_logit + 1 : chunk.end + 1]
        logprobs = logits.float().log_softmax(dim=-1)
        picked = logprobs.gather(1, torch.tensor(following, device=logits.device)[:, None])
        sequence.scores.extend(picked[:, 0].tolist())


def _sample(sequences: Rows[Sequence], logits: torch.Tensor) -> list[Sampled]:
    """A token for each sequence from its row of `logits`, which is written to where it is guided."""
    matchers = {i: s.matcher for i, s in enumerate(sequences) if s.matcher is not None and not s.matcher.ended}
    if matchers:
        hold(logits, matchers)
    rows = [
        RowSampling(
            s.job.sampling.temperature, s.job.sampling.top_k, s.job.sampling.top_p, s.job.seed + s.index, s.num_sampled
        )
        for s in sequences
    ]
    tokens = sample(logits, rows)
    token_ids = tokens.tolist()
    asked = [i for i, s in enumerate(sequences) if s.job.sampling.logprobs or s.job.sampling.top_logprobs]
    if not asked:
        return [Sampled(s, t) for s, t in zip(sequences, token_ids, strict=True)]
    index = torch.tensor(asked, device=logits.device)
    logprobs = logits[index].float().log_softmax(dim=-1)
    chosen = dict(zip(asked, logprobs.gather(1, tokens[index][:, None])[:, 0].tolist(), strict=True))
    most = min(max(sequences[i].job.sampling.top_logprobs for i in asked), logits.shape[1])
    values, ids = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], index[:, None][:, :0])
    tops = {
        i: tuple(pair for pair in zip(row_ids[:k], row_values[:k], strict=True) if pair[1] > float("-inf"))
        for i, row_ids, row_values in zip(asked, ids.tolist(), values.tolist(), strict=True)
        if (k := sequences[i].job.sampling.top_logprobs)
    }
    return [
        Sampled(s, t, chosen.get(i), tops.get(i)) for i, (s, t) in enumerate(zip(sequences, token_ids, strict=True))
    ]


def _read_positions(chunks: Rows[Chunk], starts: Rows[int]) -> tuple[list[int], list[int]]:
    """Indices into the flat row whose logits are read, and each chunk's first row among them."""
    read: list[int] = []
    first_rows: list[int] = []
    for chunk, offset in zip(chunks, starts, strict=False):
        first_rows.append(len(read))
        read.extend(range(offset + chunk.first_logit - chunk.start, offset + chunk.end - chunk.start))
    return read, first_rows


def _plan(chunks: Rows[Chunk], starts: Rows[int], device: torch.device) -> StepPlan:
    singles: list[tuple[int, int, int]] = []
    prefill: list[PrefillRun] = []
    for chunk, offset in zip(chunks, starts, strict=False):
        if chunk.end - chunk.start == 1:
            singles.append((chunk.sequence.slot, offset, chunk.end))
        else:
            end = offset + chunk.end - chunk.start
            prefill.append(PrefillRun(chunk.sequence.slot, offset, end, chunk.start))
    singles.sort()
    return StepPlan(plan_decode(singles, device), tuple(prefill))
