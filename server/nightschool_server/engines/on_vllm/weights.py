"""Reading and replacing the weight of one of vLLM's Linears, however the device keeps it.

On a CPU vLLM packs a weight for its kernels and drops the original. The kernel itself gives it back: applied to the
identity, every output is one weight times one plus zeros, which is exact in any precision.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

_IDENTITY_ROWS = 512


def can_replace(layer: Any) -> bool:
    """Whether the Linear has a plain floating-point weight, not a quantised one."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def read_weight(layer: Any) -> torch.Tensor:
    """A copy of the weight [out_features, in_features]."""
    if layer.weight.numel():
        return layer.weight.detach().clone()
    num_inputs = layer.input_size_per_partition
    columns = []
    for start in range(0, num_inputs, _IDENTITY_ROWS):
        rows = torch.zeros(min(_IDENTITY_ROWS, num_inputs - start), num_inputs, dtype=layer.weight.dtype)
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 1
        columns.append(layer.cpu_linear(rows, layer.weight, None))
    return torch.cat(columns).T.contiguous()


def write_weight(layer: Any, weight: torch.Tensor) -> None:
    """Make `weight` [out_features, in_features] the Linear's."""
    if layer.weight.numel():
        layer.weight.data.copy_(weight)
    if current_platform.is_cpu():
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        remove = not layer.weight.numel()
        if remove:
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=remove)
