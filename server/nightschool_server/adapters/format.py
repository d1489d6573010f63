"""What makes files an adapter: PEFT's LoRA configuration and safetensors weights. Nothing else is ever loaded.

Checks what can be checked without the model; whether the engine can serve it, the engine says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nightschool_server.errors import AdapterFormatError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_JSON_BYTES = 64 * 2**20
"""Of a configuration, a provenance or a manifest; it holds probes, never weights."""

PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


def check_names(names: Iterable[str]) -> None:
    """Raises AdapterFormatError where one of the two files is missing, with the remedy."""
    found = sorted(names)
    for wanted in (WEIGHTS_FILE, CONFIG_FILE):
        if wanted in found:
            continue
        pickles = [name for name in found if Path(name).suffix in PICKLES]
        if pickles and wanted == WEIGHTS_FILE:
            raise AdapterFormatError(
                f"{pickles[0]} is a pickle, which can run code; only safetensors are ever loaded: save the adapter "
                f"with save_pretrained(safe_serialization=True), as {WEIGHTS_FILE}"
            )
        raise AdapterFormatError(
            f"{wanted} is missing (there is: {', '.join(found) or 'nothing'}): an adapter is a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration. Raises AdapterFormatError where it is not one of a LoRA."""
    config = read_object(path.read_bytes(), CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(
            f"{CONFIG_FILE}: peft_type is {config.get('peft_type')!r}; only 'LORA' is served: use LoraConfig"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterFormatError(f"{CONFIG_FILE}: r is {rank!r}; it must be a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise AdapterFormatError(f"{CONFIG_FILE}: lora_alpha is {alpha!r}; it must be a number above 0")
    return config


def check_weights(path: Path) -> None:
    """Raises AdapterFormatError where the file is not whole or holds no LoRA; reads its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFormatError(
            f"{WEIGHTS_FILE} is no whole safetensors file ({error}): copy or save the adapter again"
        ) from None
    if not any(".lora_A." in name for name in names):
        raise AdapterFormatError(
            f"{WEIGHTS_FILE} holds no lora_A tensor ({len(names)} tensors in all): save the adapter with peft's "
            "save_pretrained"
        )


def target_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the adapted layers, or one pattern of them."""
    modules = config.get("target_modules") or ()
    return (modules,) if isinstance(modules, str) else tuple(sorted(str(module) for module in modules))


def read_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises AdapterFormatError that names `where`."""
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"{len(data)} bytes")
        value = json.loads(data)
    except ValueError as error:
        raise AdapterFormatError(f"{where} cannot be read as JSON ({error}): save the adapter again") from None
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{where} holds a JSON {type(value).__name__}, not an object: save the adapter again")
    return value
