"""A base model in 4 bits to train an adapter on: QLoRA (arXiv 2305.14314) by bitsandbytes, where that is installed.

The linear layers that can be adapted are quantised (NF4, double quantisation) after the engine's loader has checked and
read them, so that names, prompts and digests stay those that are served. Deviation from QLoRA: the first loading needs
the memory of the whole model, and so does the proof of effect at the end, which is taken on the model as it is served.
Imports torch; used by the trainer process alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch

from nightschool_learner.errors import StageFailedError


def quantize_linears(model: Any, names: Iterable[str]) -> None:
    """Put 4-bit layers in the place of a model's linear layers. Raises StageFailedError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StageFailedError(
            "learner.train.quantize is 'nf4', which needs bitsandbytes where training runs: "
            "pip install bitsandbytes, or set it to 'none'"
        )
    import bitsandbytes

    for name in names:
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        small = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
            quant_type="nf4", compress_statistics=True,
        )  # fmt: skip
        device = linear.weight.device
        small.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        small.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.data, requires_grad=False)
        setattr(model.get_submodule(parent), last, small.to(device))
    model.is_loaded_in_4bit = True
