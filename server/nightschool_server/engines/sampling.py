"""Choosing tokens, vectorised over the rows of a step.

A sample depends on its own logits, seed and position alone, never on what shares its batch: the random
number of position t in the stream of a seed is a hash of (seed, t) (two rounds of splitmix64), turned
into a token by inverting the cumulative distribution. Nothing is stored between steps, so a sequence
that is preempted and resumed continues the same stream. Greedy rows take the first maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nightschool_server.engine import Sampling
from nightschool_server.errors import InvalidRequestError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class RowSampling:
    """How one row of logits becomes a token."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    position: int
    """How many tokens of this stream were drawn before."""


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """[num_rows] numbers in [0, 1): a hash of each row's seed and position."""
    with np.errstate(over="ignore"):
        state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
        state = _mix(_mix(state + _GOLDEN) + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    uniforms: NDArray[np.float64] = (state >> np.uint64(12)).astype(np.float64) * 2.0**-52
    return uniforms


def sample(logits: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """Token ids [num_rows] from logits [num_rows, vocabulary]."""
    if all(row.temperature == 0 for row in rows):
        return logits.argmax(dim=-1)
    tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    kinds: dict[str, list[int]] = {"greedy": [], "plain": [], "filtered": []}
    for i, row in enumerate(rows):
        filtered = row.top_k > 0 or row.top_p < 1
        kinds["greedy" if row.temperature == 0 else "filtered" if filtered else "plain"].append(i)
    for kind, indices in kinds.items():
        if not indices:
            continue
        whole = len(indices) == len(rows)
        index = torch.tensor(indices, device=logits.device)
        part = logits if whole else logits[index]
        chosen = [rows[i] for i in indices]
        if kind == "greedy":
            tokens[index] = part.argmax(dim=-1)
        elif kind == "plain":
            tokens[index] = _draw(_tempered(part, chosen).softmax(dim=-1), chosen)
        else:
            tokens[index] = _sample_filtered(part, chosen)
    return tokens


def _tempered(logits: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    temperatures = torch.tensor([row.temperature for row in rows], device=logits.device, dtype=torch.float32)
    return logits.float() / temperatures[:, None]


def _sample_filtered(logits: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """Top-k, then top-p over what is left: transformers' order. The likeliest token always stays."""
    device, vocabulary = logits.device, logits.shape[1]
    values, order = _tempered(logits, rows).sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([row.top_k if row.top_k > 0 else vocabulary for row in rows], device=device)
    ranks = torch.arange(vocabulary, device=device)
    probabilities = values.masked_fill(ranks >= top_k[:, None], float("-inf")).softmax(dim=-1)
    top_p = torch.tensor([row.top_p for row in rows], device=device, dtype=probabilities.dtype)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p[:, None]) & (ranks > 0), 0.0)
    return order.gather(1, _draw(probabilities, rows)[:, None])[:, 0]


def _draw(weights: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """Index [num_rows] where each row's cumulative weight passes its uniform number."""
    wide = torch.float32 if weights.device.type == "mps" else torch.float64
    cumulative = weights.cumsum(dim=-1, dtype=wide)
    numbers = uniform([row.seed for row in rows], [row.position for row in rows])
    target = torch.from_numpy(numbers).to(device=weights.device, dtype=wide)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # In float32 a number close to 1 can round up to the total: fall back on the likeliest token.
    return torch.where(index < weights.shape[1], index, weights.argmax(dim=-1))


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed


def check_sampling(sampling: Sampling) -> None:
    """Raise InvalidRequestError, with the field, where a request's sampling breaks a rule."""
    rules = (
        ("max_tokens", sampling.max_tokens >= 1, "at least 1"),
        ("n", sampling.n >= 1, "at least 1"),
        ("temperature", 0 <= sampling.temperature < float("inf"), "a finite number of at least 0"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k >= 0, "at least 0"),
        ("top_logprobs", sampling.top_logprobs >= 0, "at least 0"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise InvalidRequestError(name, f"{name} is {getattr(sampling, name)}; it must be {rule}")
