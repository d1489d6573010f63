"""From a model folder or hub id to a model that slots can serve.

Owns what is checked about a model before anything is promised: a chat template, safetensors, layers
whose state is keys and values, positions that do not depend on the batch. The last word has the
self-test (`selftest.py`), which runs the model both ways. Reads the disk, and the hub where
HF_HUB_OFFLINE allows it.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from nightschool_server.engine import ModelInfo
from nightschool_server.engines.lora import TargetLinear, target_linears
from nightschool_server.engines.pictures import GridProcessor, ImageProcessor, Pictures, WholeProcessor
from nightschool_server.engines.rendering import Renderer, RenderingParts
from nightschool_server.engines.runner import ModelParts
from nightschool_server.errors import ModelFormatError

if TYPE_CHECKING:
    from nightschool_server.engines.transformers_engine import TransformersEngineConfig

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
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
    targets: dict[str, TargetLinear]
    """Linears that an adapter may name."""
    text_config_key: str | None
    """The sub-configuration of the text tower, None where the model is text only."""


def load_model(config: TransformersEngineConfig) -> LoadedModel:
    """Load and check a model; blocks for as long as that takes. Raises ModelFormatError."""
    folder = _folder(config.model)
    model_config = _read(lambda: AutoConfig.from_pretrained(folder), folder, "config.json")
    text_config = model_config.get_text_config()
    _check_layers(config.model, text_config)
    vision = type(model_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not vision and type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFormatError(
            f"model {config.model!r} is of type {model_config.model_type!r}, neither a causal language model nor an "
            "image-text-to-text model: serve one of those"
        )
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = _read_weights(auto, folder, dtype).to(device).eval()
    model.requires_grad_(False)
    tokenizer = _read(lambda: AutoTokenizer.from_pretrained(folder), folder, "the tokenizer")
    if not tokenizer.is_fast:
        raise ModelFormatError(
            f"model {config.model!r} has no tokenizer.json: convert its tokenizer to the fast format"
        )
    processor = _processor(folder) if vision else None
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if not isinstance(template, str):
        raise ModelFormatError(
            f"model {config.model!r} has no chat template: put a chat_template.jinja beside {folder / 'config.json'}, "
            "or serve the instruction-tuned version of the model"
        )
    image_token_id = getattr(model_config, "image_token_id", None) if vision else None
    pictures = _pictures(folder, processor, tokenizer, image_token_id)
    rope_index = getattr(getattr(model, "model", None), "get_rope_index", None) if vision else None
    info = ModelInfo(
        name=config.model,
        digest=_digest(folder),
        chat_template_digest=hashlib.sha256(template.encode()).hexdigest(),
        context_length=_context_length(config, text_config),
        accepts_images=pictures is not None,
        max_lora_rank=config.max_lora_rank,
    )
    image_inputs = inspect.signature(model.get_image_features).parameters if pictures is not None else {}
    parts = ModelParts(
        model=model,
        device=device,
        dtype=dtype,
        multimodal_positions=rope_index is not None,
        keeps_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
        image_inputs=frozenset(image_inputs),
    )
    renderer = Renderer(RenderingParts(tokenizer, template, image_token_id, pictures, rope_index))
    return LoadedModel(
        info=info,
        parts=parts,
        renderer=renderer,
        tokenizer=tokenizer,
        processor=processor,
        eos_ids=_eos_ids(model, tokenizer),
        targets=dict(target_linears(model, _text_tower(model))),
        text_config_key=_text_config_key(model_config, text_config),
    )


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelFormatError(f"model folder {name!r} does not exist: give an existing folder or a hub id")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:
        raise ModelFormatError(
            f"model {name!r} is neither a folder nor loadable from the hub ({type(error).__name__}): "
            "check the name, and that HF_HUB_OFFLINE is unset if it has not been downloaded"
        ) from error


def _read(read: Any, folder: Path, what: str) -> Any:
    try:
        return read()
    except Exception as error:
        # transformers raises anything from KeyError to SafetensorError here; all of it is about this folder.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelFormatError(
            f"{what} in {folder} cannot be loaded ({type(error).__name__}: {reason[0]}): "
            "give a complete Hugging Face model folder with safetensors weights"
        ) from error


def _read_weights(auto: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model; refused where a tensor is not in the files, which transformers would fill with random numbers."""
    settings = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True, "output_loading_info": True}
    model, report = _read(lambda: auto.from_pretrained(folder, **settings), folder, "the weights")
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


def _processor(folder: Path) -> Any:
    """The model's processor; None where it needs what is not installed (torchvision, for its videos)."""
    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError:
        return None
    except Exception as error:
        raise ModelFormatError(f"the processor in {folder} cannot be loaded: {error}") from error


def _pictures(folder: Path, processor: Any, tokenizer: Any, image_token_id: int | None) -> Pictures | None:
    if image_token_id is None:
        return None
    mark = getattr(processor, "image_token", None) or tokenizer.convert_ids_to_tokens(image_token_id)
    process: ImageProcessor
    if hasattr(processor, "image_processor"):
        process = WholeProcessor(processor, tokenizer, str(mark))
    else:
        image_processor = _read(
            lambda: AutoImageProcessor.from_pretrained(folder, backend="pil"), folder, "the image processor"
        )
        if not hasattr(image_processor, "merge_size"):
            raise ModelFormatError(f"the processor in {folder} needs torchvision: pip install torchvision")
        process = GridProcessor(image_processor, str(mark))
    return Pictures(process, str(mark))


def _context_length(config: TransformersEngineConfig, text_config: Any) -> int:
    own = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(own, int):
        own = config.context_length
    if own < 1:
        raise ModelFormatError(f"model {config.model!r} does not state its context length: set engine.context_length")
    return min(own, config.context_length) if config.context_length else own


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    stated = getattr(model.generation_config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _text_tower(model: Any) -> str:
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


def _digest(folder: Path) -> str:
    """sha256 over the names and contents of the weights', configuration's and tokenizer's files."""
    whole = hashlib.sha256()
    for path in sorted({p for pattern in _FILES for p in folder.glob(pattern)}, key=lambda p: p.name):
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
