"""A model folder or hub id as every engine reads it, the weights left out.

Owns what is checked about a model before any engine loads it: configuration, tokenizer, chat template, processor,
context length, digests. Reads the disk, and the hub where HF_HUB_OFFLINE allows it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from nightschool_server.engine import ModelInfo
from nightschool_server.engines.pictures import GridProcessor, ImageProcessor, Pictures, WholeProcessor
from nightschool_server.errors import ModelFormatError

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class ModelFolder:
    """What a model's files say about it."""

    path: Path
    config: Any
    text_config: Any
    info: ModelInfo
    tokenizer: Any
    eos_ids: frozenset[int]
    """Tokens that end an answer."""
    processor: Any
    """The whole processor where the model has one that can be built here."""
    template: str
    image_token_id: int | None
    pictures: Pictures | None
    sees: bool
    """Whether it is an image-text-to-text model."""


def read_model_folder(name: str, *, context_length: int, max_lora_rank: int, with_digest: bool = True) -> ModelFolder:
    """Read and check what is beside the weights. Raises ModelFormatError.

    `context_length` 0 is the model's own. Without its digest, for which all weights are read (0.7 s per GiB), the
    information has an empty one.
    """
    folder = _folder(name)
    model_config = read(lambda: AutoConfig.from_pretrained(folder), folder, "config.json")
    text_config = model_config.get_text_config()
    sees = type(model_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not sees and type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFormatError(
            f"model {name!r} is of type {model_config.model_type!r}, neither a causal language model nor an "
            "image-text-to-text model: serve one of those"
        )
    tokenizer = read(lambda: AutoTokenizer.from_pretrained(folder), folder, "the tokenizer")
    if not tokenizer.is_fast:
        raise ModelFormatError(f"model {name!r} has no tokenizer.json: convert its tokenizer to the fast format")
    processor = _processor(folder) if sees else None
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if not isinstance(template, str):
        raise ModelFormatError(
            f"model {name!r} has no chat template: put a chat_template.jinja beside {folder / 'config.json'}, "
            "or serve the instruction-tuned version of the model"
        )
    image_token_id = getattr(model_config, "image_token_id", None) if sees else None
    pictures = _pictures(folder, processor, tokenizer, image_token_id)
    info = ModelInfo(
        name=name,
        digest=_digest(folder) if with_digest else "",
        chat_template_digest=hashlib.sha256(template.encode()).hexdigest(),
        context_length=_context_length(name, context_length, text_config),
        accepts_images=pictures is not None,
        max_lora_rank=max_lora_rank,
    )
    return ModelFolder(
        path=folder,
        config=model_config,
        text_config=text_config,
        info=info,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(folder, model_config, tokenizer),
        processor=processor,
        template=template,
        image_token_id=image_token_id,
        pictures=pictures,
        sees=sees,
    )


def digested(folder: ModelFolder) -> ModelFolder:
    """The folder with its digest, for which all weights are read."""
    return replace(folder, info=replace(folder.info, digest=_digest(folder.path)))


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


def read(load: Any, folder: Path, what: str) -> Any:
    """What `load` returns; whatever it raises becomes a ModelFormatError about `what` in `folder`."""
    try:
        return load()
    except Exception as error:
        # transformers raises anything from KeyError to SafetensorError here; all of it is about this folder.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelFormatError(
            f"{what} in {folder} cannot be loaded ({type(error).__name__}: {reason[0]}): "
            "give a complete Hugging Face model folder with safetensors weights"
        ) from error


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
        image_processor = read(
            lambda: AutoImageProcessor.from_pretrained(folder, backend="pil"), folder, "the image processor"
        )
        if not hasattr(image_processor, "merge_size"):
            raise ModelFormatError(f"the processor in {folder} needs torchvision: pip install torchvision")
        process = GridProcessor(image_processor, str(mark))
    return Pictures(process, str(mark))


def _context_length(name: str, wanted: int, text_config: Any) -> int:
    own = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(own, int):
        own = wanted
    if own < 1:
        raise ModelFormatError(f"model {name!r} does not state its context length: set engine.context_length")
    return min(own, wanted) if wanted else own


def _eos_ids(folder: Path, model_config: Any, tokenizer: Any) -> frozenset[int]:
    if (folder / "generation_config.json").exists():
        generation = read(lambda: GenerationConfig.from_pretrained(folder), folder, "generation_config.json")
    else:
        generation = GenerationConfig.from_model_config(model_config)
    ids = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _digest(folder: Path) -> str:
    """sha256 over the names and contents of the weights', configuration's and tokenizer's files."""
    whole = hashlib.sha256()
    for path in sorted({p for pattern in _FILES for p in folder.glob(pattern)}, key=lambda p: p.name):
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
