"""From a model folder or hub id to a model that slots can serve.

Owns what is checked about a model before slots promise anything: safetensors, layers whose state is keys and
values, positions that do not depend on the batch. The last word has the self-test (`selftest.py`), which runs
the model both ways.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from nightschool_server.engine import ModelInfo
from nightschool_server.engines.lora import TargetLinear, target_linears
from nightschool_server.engines.model_folder import read, read_model_folder
from nightschool_server.engines.rendering import Renderer, RenderingParts
from nightschool_server.engines.runner import ModelParts
from nightschool_server.errors import ModelFormatError

if TYPE_CHECKING:
    from nightschool_server.engines.transformers_engine import TransformersEngineConfig

_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class LoadedModel:
    """Everything about a model that the engine needs."""

    info: ModelInfo
    parts: ModelParts
    renderer: Renderer
    tokenizer: Any
    processor: Any
    """The whole processor where the model has one that can be built here, for the self-test."""
    eos_ids: frozenset[int]
    vocab_size: int
    """Width of the logits."""
    targets: dict[str, TargetLinear]
    """Linears that an adapter may name."""
    text_config_key: str | None
    """The sub-configuration of the text tower, None where the model is text only."""


def load_model(config: TransformersEngineConfig) -> LoadedModel:
    """Load and check a model; blocks for as long as that takes. Raises ModelFormatError."""
    found = read_model_folder(config.model, context_length=config.context_length, max_lora_rank=config.max_lora_rank)
    _check_layers(config.model, found.text_config)
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    auto = AutoModelForImageTextToText if found.sees else AutoModelForCausalLM
    model = _read_weights(auto, found.path, dtype).to(device).eval()
    model.requires_grad_(False)
    rope_index = getattr(getattr(model, "model", None), "get_rope_index", None) if found.sees else None
    image_inputs = inspect.signature(model.get_image_features).parameters if found.pictures is not None else {}
    parts = ModelParts(
        model=model,
        device=device,
        dtype=dtype,
        multimodal_positions=rope_index is not None,
        keeps_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
        image_inputs=frozenset(image_inputs),
    )
    renderer = Renderer(
        RenderingParts(found.tokenizer, found.template, found.image_token_id, found.pictures, rope_index)
    )
    return LoadedModel(
        info=found.info,
        parts=parts,
        renderer=renderer,
        tokenizer=found.tokenizer,
        processor=found.processor,
        eos_ids=found.eos_ids,
        vocab_size=found.text_config.vocab_size,
        targets=dict(target_linears(model, text_tower(model))),
        text_config_key=_text_config_key(found.config, found.text_config),
    )


def _read_weights(auto: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model; refused where a tensor is not in the files, which transformers would fill with random numbers."""
    settings = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True, "output_loading_info": True}
    model, report = read(lambda: auto.from_pretrained(folder, **settings), folder, "the weights")
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelFormatError(
            f"the weights in {folder} lack {len(missing)} tensors that config.json asks for ({missing[0]}, ...): "
            "give the configuration and the weights of one model"
        )
    return model


def _check_layers(name: str, text_config: Any) -> None:
    unserved = sorted(set(getattr(text_config, "layer_types", None) or ()) - _SERVED_LAYERS)
    if unserved:
        raise ModelFormatError(
            f"model {name!r} has {', '.join(unserved)} layers, whose state slots cannot hold; this engine serves "
            f"{', '.join(sorted(_SERVED_LAYERS))}: use another model or the vLLM engine"
        )
    rope = getattr(text_config, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    kinds = {str(r.get("rope_type")) for r in (rope, *nested)}
    if kinds & _BATCH_DEPENDENT_ROPE:
        raise ModelFormatError(
            f"model {name!r} scales its rotary positions by the longest sequence of a batch "
            f"({', '.join(sorted(kinds & _BATCH_DEPENDENT_ROPE))}): use another model or the vLLM engine"
        )


def text_tower(model: Any) -> str:
    """The path of the text decoder inside the model, '' where it is the whole model."""
    decoder = model.get_decoder()
    return next((path for path, module in model.named_modules() if module is decoder), "")


def _text_config_key(model_config: Any, text_config: Any) -> str | None:
    if text_config is model_config:
        return None
    return next(str(key) for key in model_config.sub_configs if getattr(model_config, key) is text_config)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
