"""Which Linears of a model an adapter may name, found without its weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from nightschool_server.engines.loading import text_tower
from nightschool_server.engines.lora import TargetLinear, target_linears
from nightschool_server.engines.model_folder import ModelFolder


def adapter_targets(folder: ModelFolder) -> dict[str, TargetLinear]:
    """The text tower's Linears by their path in the transformers model, whose names adapters use."""
    auto = AutoModelForImageTextToText if folder.sees else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(folder.config)
    return dict(target_linears(model, text_tower(model)))
