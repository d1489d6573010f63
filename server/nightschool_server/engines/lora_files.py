"""Reading an adapter: a PEFT folder of `adapter_config.json` and `adapter_model.safetensors`, nothing else.

Owns the checks: whatever this engine cannot serve exactly as peft would is refused with the file, the
value, the rule and the remedy. Pickles are never opened. Returns tensors ready for `lora.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from nightschool_server.errors import AdapterFormatError

if TYPE_CHECKING:
    from nightschool_server.engines.lora import TargetLinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_UNDERSTOOD = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "peft_type", "task_type"),
        *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "runtime_config"),
        *("qalora_group_size", "megatron_core", "ensure_weight_tying"),
    }
)
"""Settings that need no action beyond the tensors, or that this file applies."""

_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "true", "false"})
"""Initialisations that leave the base weights as they are."""

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclass(frozen=True)
class AdapterWeights:
    """The tensors of one adapter version."""

    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """By module path: A transposed [in_features, rank], and B transposed and scaled [rank, out_features]."""

    def to(self, device: torch.device, dtype: torch.dtype) -> AdapterWeights:
        """The same on the model's device, contiguous."""
        return AdapterWeights(
            {
                path: (a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous())
                for path, (a, b) in self.modules.items()
            }
        )


def read_adapter(folder: Path, targets: Mapping[str, TargetLinear], max_lora_rank: int) -> AdapterWeights:
    """Read and check an adapter against the model's Linears.

    Raises AdapterFormatError. Reads the disk: keep it off the event loop and the owner thread.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise AdapterFormatError(
                f"{folder / WEIGHTS_FILE}: tensor {key!r} is not lora_A.weight or lora_B.weight of a module: "
                "only plain LoRA on Linear layers is served; retrain without modules_to_save, DoRA or bias"
            )
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    if not pairs:
        raise AdapterFormatError(f"{folder / WEIGHTS_FILE} holds no tensors: train and save the adapter again")
    return AdapterWeights(
        {module: _pair(folder, module, pair, (config, targets, max_lora_rank)) for module, pair in pairs.items()}
    )


def _pair(
    folder: Path,
    module: str,
    pair: Mapping[str, torch.Tensor],
    rules: tuple[dict[str, Any], Mapping[str, TargetLinear], int],
) -> tuple[torch.Tensor, torch.Tensor]:
    config, targets, max_lora_rank = rules
    where = f"{folder / WEIGHTS_FILE}: module {module!r}"
    target = targets.get(module)
    if target is None:
        raise AdapterFormatError(
            f"{where} is not a Linear of the text tower's decoder layers; this model has "
            f"{_some(targets)}: train on those only"
        )
    if set(pair) != {"A", "B"}:
        raise AdapterFormatError(f"{where} has lora_{next(iter(pair))} alone: save the adapter again with both halves")
    a, b = pair["A"], pair["B"]
    rank = a.shape[0]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != target.in_features or tuple(b.shape) != (target.out_features, rank):
        raise AdapterFormatError(
            f"{where} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; the model needs "
            f"[rank, {target.in_features}] and [{target.out_features}, rank]: train on this base model"
        )
    if rank > max_lora_rank:
        raise AdapterFormatError(
            f"{where} has rank {rank}; this engine's max_lora_rank is {max_lora_rank}: "
            "raise engine.max_lora_rank or retrain"
        )
    stated = _by_pattern(config.get("rank_pattern"), module, config["r"])
    if stated != rank:
        raise AdapterFormatError(
            f"{where} has rank {rank}, {CONFIG_FILE} says {stated}: the two files are not of one adapter"
        )
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise AdapterFormatError(f"{where} holds values that are not finite: the training diverged, train again")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return a.float().T, b.float().T * scale


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFormatError(
            f"{path} is missing: an adapter is a folder with {CONFIG_FILE}, {WEIGHTS_FILE}"
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{path} cannot be read as JSON ({error}): save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{path} holds a JSON {type(config).__name__}, not an object: save the adapter again")
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' is served: retrain")
    for name, low in (("r", 1), ("lora_alpha", 0)):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < low:
            raise AdapterFormatError(f"{path}: {name} is {value!r}; it must be a number of at least {low}")
    if config.get("use_dora"):
        raise AdapterFormatError(f"{path}: use_dora is true; DoRA is not served: retrain with use_dora=False")
    if config.get("bias", "none") != "none":
        raise AdapterFormatError(f"{path}: bias is {config['bias']!r}; only 'none' is served: retrain with bias='none'")
    if config.get("modules_to_save"):
        raise AdapterFormatError(
            f"{path}: modules_to_save is {config['modules_to_save']!r}; whole modules are not served: retrain without"
        )
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INITS:
        raise AdapterFormatError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights: retrain with True"
        )
    for name, value in config.items():
        if name not in _UNDERSTOOD and value and value != "none":
            raise AdapterFormatError(
                f"{path}: {name} is {value!r}, which this engine does not apply: retrain without it"
            )
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"})
        if pickles:
            raise AdapterFormatError(
                f"{folder / pickles[0]} is a pickle, which can run code; only safetensors are loaded: "
                f"save the adapter as {WEIGHTS_FILE}"
            )
        raise AdapterFormatError(f"{path} is missing: an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFormatError(f"{path} is corrupt or truncated ({error}): copy or save the adapter again") from None


def _by_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """peft's rule (utils/other.py, get_pattern_key): the first pattern that matches the end of the path."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _some(names: Iterable[str]) -> str:
    last = sorted({name.rpartition(".")[2] for name in names})
    return ", ".join(last) or "none"
