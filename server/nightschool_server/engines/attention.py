"""Attention over slots: the tokens of all sequences in one flat row, each reading its own slot.

Owns the attention function that the served model runs (registered with transformers under `NAME`, its
public extension point) and the plan of one step that it reads. Tokens of sequences that decode are
answered together, one call per run of neighbouring slots, on views of the cache; each prefill chunk has
a call of its own. Grouped-query heads are folded into the query length, so the cache is never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from nightschool_server.errors import ModelFormatError

NAME = "nightschool_slots"

_MAX_BRIDGED_SLOTS = 2
"""Idle slots inside a run of decoding ones are read and thrown away: cheaper than another call (17 us
against 25 us a layer, tiny model)."""

_HARMLESS = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cache_position"})


@dataclass(frozen=True)
class DecodeRun:
    """One token each of sequences in neighbouring slots."""

    first_slot: int
    end_slot: int
    tokens: slice | torch.Tensor
    """Where their tokens are in the flat row, in slot order; bridged slots repeat token 0's index."""
    kept: torch.Tensor | None
    """Rows of this run that are not bridged, None where all are real."""
    kept_tokens: slice | torch.Tensor
    """Where the answers of the kept rows go."""
    lengths: torch.Tensor
    """[num_slots_of_run] tokens to read in each slot, the new one among them."""
    max_length: int


@dataclass(frozen=True)
class PrefillRun:
    """Several tokens of one sequence, at positions [offset, offset + end - start)."""

    slot: int
    start: int
    end: int
    offset: int


@dataclass
class StepPlan:
    """How one step's flat row of tokens maps to slots."""

    decode: tuple[DecodeRun, ...]
    prefill: tuple[PrefillRun, ...]
    masks: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    """Additive masks by (kind, run, window, groups): made by the first layer that needs them."""


def slot_attention(  # noqa: PLR0917 - transformers' signature
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slot_plan: StepPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend query [1, heads, num_tokens, dim] to the layer's slots; returns [1, num_tokens, heads, dim_v].

    `key` and `value` are the whole layer [slots, capacity, kv_heads, dim] as `SlotCache.update` returns them.
    Raises ModelFormatError where a model asks for attention that slots cannot give.
    """
    del attention_mask
    if slot_plan is None:
        raise ModelFormatError(f"{type(module).__name__} does not pass keyword arguments on to its attention function")
    unknown = sorted(name for name, v in kwargs.items() if name not in _HARMLESS and v is not None and v is not False)
    if unknown:
        raise ModelFormatError(f"{type(module).__name__} uses {', '.join(unknown)}, which slot attention does not know")
    heads, kv_heads = query.shape[1], key.shape[2]
    groups = heads // kv_heads
    rows = query[0].transpose(0, 1)  # [num_tokens, heads, dim]
    out = value.new_empty((rows.shape[0], heads, value.shape[3]))
    for run in slot_plan.decode:
        q = rows[run.tokens].view(-1, kv_heads, groups, rows.shape[2])
        k = key[run.first_slot : run.end_slot, : run.max_length].transpose(1, 2)
        v = value[run.first_slot : run.end_slot, : run.max_length].transpose(1, 2)
        mask = _decode_mask(slot_plan, run, sliding_window, query)
        answer = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        answer = answer.reshape(-1, heads, value.shape[3])
        out[run.kept_tokens] = answer if run.kept is None else answer[run.kept]
    for chunk in slot_plan.prefill:
        num_tokens, length = chunk.end - chunk.start, chunk.offset + chunk.end - chunk.start
        q = query[:, :, chunk.start : chunk.end].reshape(1, kv_heads, groups * num_tokens, rows.shape[2])
        k = key[chunk.slot : chunk.slot + 1, :length].transpose(1, 2)
        v = value[chunk.slot : chunk.slot + 1, :length].transpose(1, 2)
        if chunk.offset == 0 and groups == 1 and sliding_window is None:
            answer = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        else:
            mask = _prefill_mask(slot_plan, chunk, sliding_window, groups, query)
            answer = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out[chunk.start : chunk.end] = answer.reshape(heads, num_tokens, value.shape[3]).transpose(0, 1)
    return out[None], None


AttentionInterface.register(NAME, slot_attention)


def plan_decode(tokens_by_slot: list[tuple[int, int, int]], device: torch.device) -> tuple[DecodeRun, ...]:
    """Runs for single tokens given as (slot, token's index in the flat row, length with it), sorted by slot."""
    runs: list[list[tuple[int, int, int]]] = []
    for entry in tokens_by_slot:
        if runs and entry[0] - runs[-1][-1][0] <= 1 + _MAX_BRIDGED_SLOTS:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return tuple(_decode_run(run, device) for run in runs)


def _decode_run(run: list[tuple[int, int, int]], device: torch.device) -> DecodeRun:
    first, end = run[0][0], run[-1][0] + 1
    indices = [index for _, index, _ in run]
    max_length = max(length for _, _, length in run)
    ordered = indices == list(range(indices[0], indices[0] + len(indices)))
    kept_tokens = slice(indices[0], indices[-1] + 1) if ordered else torch.tensor(indices, device=device)
    if end - first == len(run):
        lengths = torch.tensor([length for _, _, length in run], device=device)
        return DecodeRun(first, end, kept_tokens, None, kept_tokens, lengths, max_length)
    all_indices, all_lengths = [indices[0]] * (end - first), [1] * (end - first)
    for slot, index, length in run:
        all_indices[slot - first], all_lengths[slot - first] = index, length
    kept = torch.tensor([slot - first for slot, _, _ in run], device=device)
    lengths = torch.tensor(all_lengths, device=device)
    return DecodeRun(first, end, torch.tensor(all_indices, device=device), kept, kept_tokens, lengths, max_length)


def _decode_mask(plan: StepPlan, run: DecodeRun, window: int | None, query: torch.Tensor) -> torch.Tensor | None:
    """[slots_of_run, 1, 1, max_length], or None where the run is one slot that is read whole."""
    if run.end_slot - run.first_slot == 1 and (window is None or run.max_length <= window):
        return None
    key = ("decode", run.first_slot, window)
    if key not in plan.masks:
        positions = torch.arange(run.max_length, device=query.device)
        seen = positions < run.lengths[:, None]
        if window is not None:
            seen &= positions >= run.lengths[:, None] - window
        plan.masks[key] = _additive(seen, query.dtype)[:, None, None]
    return plan.masks[key]


def _prefill_mask(
    plan: StepPlan, chunk: PrefillRun, window: int | None, groups: int, query: torch.Tensor
) -> torch.Tensor:
    """[1, 1, groups * num_tokens, length]: causal from the chunk's offset."""
    key = ("prefill", chunk.start, window, groups)
    if key not in plan.masks:
        length = chunk.offset + chunk.end - chunk.start
        rows = torch.arange(chunk.offset, length, device=query.device)[:, None]
        columns = torch.arange(length, device=query.device)
        seen = columns <= rows
        if window is not None:
            seen &= columns > rows - window
        plan.masks[key] = _additive(seen, query.dtype).repeat(groups, 1)[None, None]
    return plan.masks[key]


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
