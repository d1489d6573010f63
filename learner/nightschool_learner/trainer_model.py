"""The model that a trainer tunes: base, the layers that LoRA adapts, the adapter to continue.

Loaded by the engine's own loader, so that the trainer renders prompts as they are served and refuses what the
engine would refuse. Works for text models and for vision-language models alike: only linear layers of the text
tower are adapted, the vision tower and what connects it stay as they are. Imports torch and peft; used by the
trainer process alone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nightschool_server.engine import BASE
from nightschool_server.engines.loading import LoadedModel, load_model
from nightschool_server.engines.rendering import Renderer
from nightschool_server.engines.transformers_engine import TransformersEngineConfig
from peft import LoraConfig, PeftModel

from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import Hyperparameters, Manifest
from nightschool_learner.trainer_quantized import quantize_linears

DEFAULT = "default"
"""The name under which TRL looks for the adapter to continue; it keeps a frozen copy called `ref`."""


@dataclass(frozen=True)
class Student:
    """What is trained."""

    model: Any
    """The base model, or a PeftModel with a trainable `default` where a parent is continued."""
    loaded: LoadedModel
    lora: LoraConfig | None
    """A fresh adapter's configuration; None where the parent's is continued."""
    target_modules: str
    """The pattern of adapted layers."""

    @property
    def renderer(self) -> Renderer:
        """Renders prompts as the engine does."""
        return self.loaded.renderer


def load_student(manifest: Manifest, device: Literal["cpu", "cuda", "mps"]) -> Student:
    """Load base and parent. On a CPU in float32, because bfloat16 is emulated there; on a GPU in bfloat16.

    A parent keeps its own rank, alpha and layers, whatever the manifest says: a LoRA cannot change them.
    Raises StageFailedError where the base is not the served one or the parent has no folder.
    """
    loaded = load_base(manifest.base_model, device)
    if manifest.base_digest and loaded.info.digest != manifest.base_digest:
        raise StageFailedError(
            f"{manifest.base_model} has digest {loaded.info.digest[:12]}, the server serves "
            f"{manifest.base_digest[:12]}: the folder changed; restart the server"
        )
    model, wanted = loaded.parts.model, manifest.hyperparameters
    if wanted.quantize == "nf4":
        quantize_linears(model, loaded.targets)
    if manifest.parent == BASE:
        pattern = target_pattern(loaded.targets, wanted.target_modules)
        return Student(model, loaded, fresh_lora(pattern, wanted), pattern)
    if manifest.parent_folder is None or not manifest.parent_folder.is_dir():
        raise StageFailedError(
            f"parent adapter {manifest.parent!r} has no folder at {manifest.parent_folder}: "
            "roll back to an adapter that exists"
        )
    model = PeftModel.from_pretrained(model, str(manifest.parent_folder), adapter_name=DEFAULT, is_trainable=True)
    targets = model.peft_config[DEFAULT].target_modules
    return Student(model, loaded, None, targets if isinstance(targets, str) else ",".join(sorted(targets)))


def load_base(base_model: str, device: Literal["auto", "cpu", "cuda", "mps"] = "auto") -> LoadedModel:
    """The base model as the engine loads it, on plain attention: on a GPU in bfloat16, else in float32."""
    return load_model(TransformersEngineConfig(base_model, device=device))


def as_served(manifest: Manifest, model: Any, folder: Path) -> Any:
    """The adapter of a model whose base was quantised, on the base as it is served. `folder` is used and removed."""
    model.save_pretrained(str(folder), selected_adapters=[DEFAULT], safe_serialization=True)
    base = load_base(manifest.base_model, model.device.type)
    served = PeftModel.from_pretrained(base.parts.model, str(folder))
    shutil.rmtree(folder)
    return served


def fresh_lora(pattern: str, wanted: Hyperparameters) -> LoraConfig:
    """The configuration of a new adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM", r=wanted.rank, lora_alpha=wanted.alpha, lora_dropout=wanted.dropout,
        target_modules=pattern,
    )  # fmt: skip


def target_pattern(servable: Iterable[str], only: tuple[str, ...] = ()) -> str:
    """A regular expression that peft matches against whole module names: the text tower's linear layers.

    `servable` are the names that the engine can serve an adapter on; `only` restricts them by their last name.
    The expression goes into `adapter_config.json`. Raises StageFailedError for a layer that is not there.
    """
    names = list(servable)
    there = {_last(name) for name in names}
    if missing := sorted(set(only) - there):
        raise StageFailedError(
            f"learner.train.target_modules has {missing}, but the text tower's linear layers are {sorted(there)}"
        )
    kept = sorted(set(only) or there)
    towers = sorted({name.partition(".layers.")[0] for name in names if ".layers." in name})
    start = f"(?:{'|'.join(map(re.escape, towers))})"
    pattern = rf"{start}\.layers\..*\.(?:{'|'.join(map(re.escape, kept))})"
    wanted = {name for name in names if _last(name) in kept}
    assert wanted == {name for name in names if re.fullmatch(pattern, name)}, "the pattern covers what is servable"
    return pattern


def _last(name: str) -> str:
    return name.rpartition(".")[2]
