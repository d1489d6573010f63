"""The worker's side of adapters: which are there, which one is merged into the weights, what the others then are.

vLLM calls this file "worker extension": its methods run in the worker process through `collective_rpc`, between two
steps of the model. Every request names an adapter by number, the base model included, whose adapter is empty. One of
them is merged; its rows run without LoRA, and every other adapter Y runs as Y minus the merged one (the ranks add up).
A request carries its number alone, so what runs for it can be exchanged between two of its tokens, and keys and values
computed before are those of the same adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from nightschool_server.engines.on_vllm.weights import can_replace, read_weight, write_weight

log = logging.getLogger(__name__)

BASE_NUMBER = 1
"""The base model's adapter number. vLLM's start at 1; 0 is a row without LoRA."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [rank, in_features] and B [out_features, rank], scaled."""


class LaneExtension:
    """Methods of the worker for `collective_rpc`; `self` is the worker."""

    model_runner: Any

    def nightschool_open(self) -> None:
        """Put our manager in the place of vLLM's; called once, before the first request."""
        inner = self.model_runner.lora_manager
        inner.remove_all_adapters()
        self.model_runner.lora_manager = LaneManager(inner)

    def nightschool_load(self, number: int, name: str, path: str) -> None:
        """Read an adapter from its folder."""
        self.model_runner.lora_manager.load(number, name, path)

    def nightschool_randomise(self, number: int, rank: int, std: float) -> None:
        """Make an adapter of random numbers, for the self-test."""
        self.model_runner.lora_manager.randomise(number, rank, std)

    def nightschool_forget(self, number: int) -> None:
        """Drop an adapter that no request names."""
        self.model_runner.lora_manager.forget(number)

    def nightschool_merge(self, number: int) -> None:
        """Have another adapter merged."""
        self.model_runner.lora_manager.merge(number)

    def nightschool_checksum(self) -> float:
        """A number over all weights that an adapter may change, for tests."""
        return float(self.model_runner.lora_manager.checksum())


class LaneManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's manager of adapters, which knows what each is and which one is merged."""

    def __init__(self, inner: LRUCacheWorkerLoRAManager) -> None:
        # It takes over the state of the one that vLLM made: both are never used at once.
        self.__dict__.update(inner.__dict__)
        self._pairs: dict[int, dict[str, Pair]] = {BASE_NUMBER: {}}
        self._pristine: dict[str, torch.Tensor] = {}
        self._merged = BASE_NUMBER

    def load(self, number: int, name: str, path: str) -> None:
        """Read an adapter; it is put into a slot at its first row."""
        model = super()._load_adapter(LoRARequest(lora_name=name, lora_int_id=number, lora_path=path))
        self._pairs[number] = {module: _pair(lora) for module, lora in model.loras.items()}

    def randomise(self, number: int, rank: int, std: float) -> None:
        """Make an adapter of random numbers over every Linear that takes one."""
        generator = torch.Generator().manual_seed(number)
        pairs: dict[str, Pair] = {}
        for module, layer in self._linears():
            packed = self._adapter_manager.packed_modules.get(module, [module])
            widths = layer.output_slices if len(packed) > 1 else (sum(layer.output_slices),)
            for name, width in zip(packed, widths, strict=True):
                a = torch.randn(rank, layer.input_size, generator=generator) * std
                b = torch.randn(width * layer.tp_size, rank, generator=generator) * std
                pairs[name] = a.to(self.lora_config.lora_dtype), b.to(self.lora_config.lora_dtype)
        self._pairs[number] = pairs

    def forget(self, number: int) -> None:
        """Drop an adapter."""
        if number in (BASE_NUMBER, self._merged):
            raise ValueError(f"adapter {number} is the base model or merged: merge another one first")
        self._pairs.pop(number, None)
        self.remove_adapter(number)

    def merge(self, number: int) -> None:
        """Write base weights plus this adapter's into the model, from the pristine weights."""
        if number not in self._pairs:
            raise ValueError(f"adapter {number} is not loaded")
        if number == self._merged:
            return
        touched = {module for module, _ in self._linears() if self._names(module) & set(self._pairs[number])}
        refused = [
            module for module, layer in self._linears() if module in touched and not can_replace(layer.base_layer)
        ]
        if refused:
            raise ValueError(f"the weights of {refused[0]} are quantised: merging needs plain ones")
        self.remove_all_adapters()
        slot = self._activate_alone(number) if touched else None
        for module, layer in self._linears():
            if module in touched:
                pristine = self._pristine.get(module)
                if pristine is None:
                    pristine = self._pristine[module] = read_weight(layer.base_layer)
                write_weight(layer.base_layer, _plus(pristine, layer, slot))
            elif module in self._pristine:
                write_weight(layer.base_layer, self._pristine[module].clone())
        self.remove_all_adapters()
        self._merged = number
        log.info("event=vllm_merged adapter=%d modules=%d", number, len(touched))

    def checksum(self) -> float:
        """The sum of the absolute weights of every Linear that takes an adapter."""
        total = 0.0
        for _, layer in self._linears():
            total += float(read_weight(layer.base_layer).double().abs().sum())
        return total

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Prepare the slots of a step; rows of the merged adapter run without LoRA."""
        merged = self._merged
        needed = {request for request in requests if request and request.lora_int_id != merged}
        if mapping is not None and len(needed) < len(requests):
            mapping = replace(
                mapping,
                index_mapping=tuple(0 if number == merged else number for number in mapping.index_mapping),
                prompt_mapping=tuple(0 if number == merged else number for number in mapping.prompt_mapping),
            )
        super().set_active_adapters(needed, mapping)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Called by vLLM for an adapter that has no slot: what it is against the merged one, never from the disk."""
        return self._difference(lora_request.lora_int_id)

    def _difference(self, number: int) -> LoRAModel:
        mine, merged = self._pairs[number], self._pairs[self._merged]
        return _model(
            number,
            {module: _combine(mine.get(module), merged.get(module)) for module in dict.fromkeys((*mine, *merged))},
        )

    def _activate_alone(self, number: int) -> int:
        """Put the adapter itself into a slot, whatever is merged; gives the slot."""
        manager = self._adapter_manager
        manager.add_adapter(
            _model(number, {module: (a.clone(), b.clone()) for module, (a, b) in self._pairs[number].items()})
        )
        manager.activate_adapter(number)
        return int(manager.lora_index_to_id.index(number))

    def _linears(self) -> Iterable[tuple[str, BaseLinearLayerWithLoRA]]:
        for module, layer in self._adapter_manager.modules.items():
            if isinstance(layer, BaseLinearLayerWithLoRA):
                yield module, layer

    def _names(self, module: str) -> set[str]:
        """The module, and those that vLLM packed into it."""
        return {module, *self._adapter_manager.packed_modules.get(module, ())}


def _pair(lora: LoRALayerWeights) -> Pair:
    return lora.lora_a, lora.lora_b * lora.scaling


def _combine(mine: Pair | None, merged: Pair | None) -> Pair:
    """`mine` minus `merged` as one pair, whose tensors nobody else holds."""
    terms = [mine] if mine else []
    if merged:
        terms.append((merged[0], -merged[1]))
    return torch.cat([a for a, _ in terms]), torch.cat([b for _, b in terms], dim=1)


def _model(number: int, pairs: dict[str, Pair]) -> LoRAModel:
    loras = {
        module: LoRALayerWeights(module, a.shape[0], a.shape[0], a, b, scaling=1) for module, (a, b) in pairs.items()
    }
    return LoRAModel(number, max((lora.rank for lora in loras.values()), default=1), loras)


def _plus(pristine: torch.Tensor, layer: BaseLinearLayerWithLoRA, slot: int | None) -> torch.Tensor:
    """The pristine weight plus what the slot's adapter adds to it, summed in float32."""
    weight = pristine.to(torch.float32, copy=True)
    start = 0
    for a, b, width in zip(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices, strict=True):
        weight[start : start + width] += b[slot, 0].float() @ a[slot, 0].float()
        start += width
    return weight.to(pristine.dtype)
