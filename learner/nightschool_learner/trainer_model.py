"""The model that a trainer tunes: base, processor, the layers that LoRA adapts, the adapter to continue.

Works for text models and for vision-language models alike: only linear layers of the text tower are
adapted, the vision tower and what connects it stay as they are, which is also what vLLM serves (its LoRA on
vision-language models is for the language tower). Imports torch, transformers and peft; used by the trainer
process alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from nightschool_server.engine import BASE
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoProcessor

from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import Hyperparameters

DEFAULT = "default"
"""The name under which TRL looks for the adapter to continue; it keeps a frozen copy called `ref`."""


@dataclass(frozen=True)
class Student:
    """What is trained."""

    model: Any
    """The base model, or a PeftModel with a trainable `default` where a parent is continued."""
    processor: Any
    """A processor, or the tokenizer of a text model."""
    lora: LoraConfig | None
    """A fresh adapter's configuration; None where the parent's is continued."""
    target_modules: str
    """The pattern of adapted layers."""

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or the tokenizer itself."""
        return getattr(self.processor, "tokenizer", self.processor)


def load_student(base_model: str, parent: str, parent_folder: Path | None, wanted: Hyperparameters) -> Student:
    """Load base and parent. On a CPU in float32, because bfloat16 is emulated there; else as stored.

    A parent keeps its own rank, alpha and layers, whatever `wanted` says: a LoRA cannot change them.
    Raises StageFailedError where the parent has no folder.
    """
    model = load_base(base_model)
    processor = AutoProcessor.from_pretrained(base_model)
    if parent == BASE:
        pattern = text_tower_pattern(model, wanted.target_modules)
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=wanted.rank, lora_alpha=wanted.alpha, lora_dropout=wanted.dropout,
            target_modules=pattern,
        )  # fmt: skip
        return Student(model, processor, lora, pattern)
    if parent_folder is None or not parent_folder.is_dir():
        raise StageFailedError(
            f"parent adapter {parent!r} has no folder at {parent_folder}: roll back to an adapter that exists"
        )
    model = PeftModel.from_pretrained(model, str(parent_folder), adapter_name=DEFAULT, is_trainable=True)
    targets = model.peft_config[DEFAULT].target_modules
    return Student(model, processor, None, targets if isinstance(targets, str) else ",".join(sorted(targets)))


def load_base(base_model: str) -> Any:
    """The model class that the folder's config names, with its weights, on the CPU or the first GPU."""
    config = AutoConfig.from_pretrained(base_model)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        raise StageFailedError(f"{base_model}: transformers has no model class {config.architectures}")
    on_gpu = torch.cuda.is_available()
    return architecture.from_pretrained(base_model, dtype="auto" if on_gpu else torch.float32)


def text_tower_pattern(model: Any, only: tuple[str, ...] = ()) -> str:
    """A regular expression that peft matches against full module names: the text tower's linear layers.

    The text tower is what transformers calls the decoder; the head is no part of it. `only` restricts the
    layers by their last name. The expression also holds for a model that carries the same tower under the
    same name, so it can stay in `adapter_config.json`. Raises StageFailedError where nothing matches.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linears = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = sorted({name.rpartition(".")[2] for name in linears} & set(only) if only else {_last(n) for n in linears})
    if not kept or set(only) - set(kept):
        raise StageFailedError(
            f"learner.train.target_modules {sorted(only)}: the text tower of {type(model).__name__} has "
            f"{sorted({_last(n) for n in linears})}"
        )
    start = re.escape(f"{prefix}.") if prefix else ""
    return rf"{start}(?:.*\.)?(?:{'|'.join(re.escape(name) for name in kept)})"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
