"""LoRA in the served model: Linears that hold the weights of many adapter versions at once.

Owns the replacement of target Linears by `AdapterLinear` and the routing of a step's tokens. The owner
thread alone calls into this file. A step's tokens are one flat row, sorted by adapter, so that a group
is a slice: the base matmul runs once over all tokens, then each adapter adds `x A' B'` to its slice.
Tokens of the base are not touched. Loading an adapter is a dict insert; nothing pauses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from nightschool_server.engines.lora_files import AdapterWeights

BASE_SERIAL = 0
"""The serial of the model without an adapter."""


@dataclass
class AdapterRoutes:
    """Which slice of this step's tokens belongs to which adapter version; shared by every AdapterLinear."""

    slices: list[tuple[int, int, int]] = field(default_factory=list)
    """(serial, start, end) in the flat row, base tokens left out."""


class AdapterLinear(nn.Module):  # type: ignore[misc]
    """A Linear with a low-rank term per adapter version."""

    def __init__(self, base: nn.Linear, routes: AdapterRoutes) -> None:
        super().__init__()
        self.base = base
        self._routes = routes
        self.versions: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By serial: A transposed [in_features, rank] and B transposed, scaled [rank, out_features]."""

    @property
    def weight(self) -> torch.Tensor:
        """The base weight, for code that asks a projection for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base bias."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, num_tokens, in_features] -> [1, num_tokens, out_features]."""
        y: torch.Tensor = self.base(x)
        if self._routes.slices and self.versions:
            rows, out = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            for serial, start, end in self._routes.slices:
                pair = self.versions.get(serial)
                if pair is not None:
                    out[start:end].addmm_(rows[start:end] @ pair[0], pair[1])
        return y


class AdapterTable:
    """The adapter versions inside one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.routes = AdapterRoutes()
        self._modules: dict[int, list[AdapterLinear]] = {}

    def install(self, serial: int, weights: AdapterWeights) -> None:
        """Make a version servable; wraps target Linears that no adapter named before."""
        wrapped = [self._wrap(path) for path in weights.modules]
        for module, (a, b) in zip(wrapped, weights.modules.values(), strict=True):
            module.versions[serial] = (a, b)
        self._modules[serial] = wrapped

    def remove(self, serial: int) -> None:
        """Forget a version."""
        for module in self._modules.pop(serial):
            del module.versions[serial]

    def _wrap(self, path: str) -> AdapterLinear:
        module = self._model.get_submodule(path)
        if isinstance(module, AdapterLinear):
            return module
        assert isinstance(module, nn.Linear)
        parent, _, name = path.rpartition(".")
        wrapper = AdapterLinear(module, self.routes)
        setattr(self._model.get_submodule(parent), name, wrapper)
        return wrapper


@dataclass(frozen=True)
class TargetLinear:
    """A Linear that an adapter may name, as adapter files are checked against."""

    in_features: int
    out_features: int


def target_linears(model: nn.Module, text_tower: str) -> Mapping[str, TargetLinear]:
    """Every Linear below the text tower's decoder layers, by its path in the model.

    Left out: the output head (its rows are not the step's tokens) and experts of a mixture (they see a
    part of the tokens).
    """
    linears: dict[str, TargetLinear] = {}
    for path, module in model.named_modules():
        below = path.startswith(text_tower + ".") if text_tower else True
        if not below or ".experts." in path or ".layers." not in f".{path}":
            continue
        if isinstance(module, nn.Linear):
            linears[path] = TargetLinear(module.in_features, module.out_features)
    return linears
