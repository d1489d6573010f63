"""LoRA on the CPU with a step's rows grouped by adapter.

vLLM's own operations for the CPU read the index -1 of a row without an adapter as the last slot, so that such rows are
answered by an adapter when both share a batch (vllm-project/vllm#48421), and they copy an adapter's weights once per
token. Here every adapter's rows go through two matrix products, and rows without one are not touched. vLLM's operations
are tried first, on a batch of three rows: once they are right, they are used again.
"""

from __future__ import annotations

import logging
from typing import Any, TypeAlias

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

log = logging.getLogger(__name__)

Rows: TypeAlias = slice | torch.Tensor
"""Some rows of a step."""


def make_lora_operations(*args: Any, **kwargs: Any) -> PunicaWrapperCPU:
    """vLLM's LoRA operations where they are right, ours otherwise."""
    if is_right(PunicaWrapperCPU):
        log.info("event=vllm_lora_operations kind=stock")
        return PunicaWrapperCPU(*args, **kwargs)
    log.info("event=vllm_lora_operations kind=grouped")
    return GroupedLoRA(*args, **kwargs)


class GroupedLoRA(PunicaWrapperCPU):  # type: ignore[misc]
    """Two matrix products per adapter of a step, over its rows alone."""

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **_: Any
    ) -> None:
        """Take in which row of the next step has which adapter."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self._groups = group_rows(self.token_lora_indices)

    def add_lora_linear(  # noqa: PLR0917
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """y [num_rows, sum(output_slices)] += scale x A' B' on each adapter's rows; one A and B per output slice."""
        for slot, rows in self._groups:
            chosen = x[rows]
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                term = (chosen @ a[slot, 0].T) @ b[slot, 0].T
                # Augmented assignment writes through an index tensor as through a slice.
                y[rows, start : start + width] += term if scale == 1.0 else term * scale
                start += width


def group_rows(slots: torch.Tensor) -> list[tuple[int, Rows]]:
    """(slot, its rows) for every slot named in `slots` [num_rows], rows without one (-1) left out."""
    groups: list[tuple[int, Rows]] = []
    for slot in torch.unique(slots).tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero()[:, 0]
        first, last = int(rows[0]), int(rows[-1])
        groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


def is_right(kind: type[PunicaWrapperCPU]) -> bool:
    """Whether these operations leave a row without an adapter alone, in a batch with rows of two adapters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=generator)
    a = torch.randn(2, 1, 2, 4, generator=generator)
    b = torch.randn(2, 1, 5, 2, generator=generator)
    slots = (-1, 1, 0)
    found = torch.zeros(3, 5)
    try:
        operations = kind(8, 4, torch.device("cpu"))
        mapping = LoRAMapping(tuple(slot + 1 for slot in slots), tuple(slot + 1 for slot in slots), is_prefill=True)
        operations.update_metadata(mapping, [1, 2], 3, 16)
        operations.add_lora_linear(found, x, (a,), (b,), 1.0, (5,))
    except Exception:
        # Whatever a later vLLM changed about its operations, ours are then no replacement it was tested with.
        log.exception("event=vllm_lora_operations_untested kind=%s", kind.__name__)
        return False
    expected = torch.stack([x[i] @ a[s, 0].T @ b[s, 0].T if s >= 0 else torch.zeros(5) for i, s in enumerate(slots)])
    return bool(torch.allclose(found, expected, atol=1e-5))
