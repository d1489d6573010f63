"""LoRA in the served model: Linears that hold the weights of many adapter versions at once.

Owns the replacement of target Linears by `AdapterLinear` and the routing of a step's tokens. The owner
thread alone calls into this file. A step's tokens are one flat row, sorted by adapter, so that a group
is a slice: the base matmul runs once over all tokens, then each adapter adds `x A' B'` to its slice.
Tokens of the base are not touched. Loading an adapter is a dict insert; nothing pauses.

One version may be merged: its Linears hold `W + (A' B')^T` beside W, which is never written. In a step
that is mostly that version's the matmul is done with the merged weight and all other tokens, one slice at
the row's start, get `- x A' B'`; every other step runs on W as if nothing were merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from nightschool_server.engines.lora_files import AdapterWeights

BASE_SERIAL = 0
"""The serial of the model without an adapter."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A transposed [in_features, rank], and B transposed and scaled [rank, out_features]."""


@dataclass
class AdapterRoutes:
    """Which slice of this step's tokens belongs to which adapter version; shared by every AdapterLinear."""

    slices: list[tuple[int, int, int]] = field(default_factory=list)
    """(serial, start, end) in the flat row of tokens that get a low-rank term of their own."""
    num_unmerged: int | None = None
    """Tokens at the row's start that are not the merged version's; None where the step runs on the base weights."""


@dataclass(frozen=True)
class Merged:
    """The version that a Linear holds merged."""

    weight: torch.Tensor
    """[out_features, in_features], W + (A' B')^T."""
    pair: Pair
    """What the other tokens get subtracted."""


class AdapterLinear(nn.Module):  # type: ignore[misc]
    """A Linear with a low-rank term per adapter version."""

    def __init__(self, base: nn.Linear, routes: AdapterRoutes) -> None:
        super().__init__()
        self.base = base
        self._routes = routes
        self.versions: dict[int, Pair] = {}
        """By serial."""
        self.merged: Merged | None = None
        """None where nothing is merged, or the merged version does not name this Linear."""

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
        routes, merged = self._routes, self.merged
        y: torch.Tensor
        if merged is None or routes.num_unmerged is None:
            y = self.base(x)
        else:
            y = functional.linear(x, merged.weight, self.base.bias)
            if end := routes.num_unmerged:
                a, b = merged.pair
                y.view(-1, y.shape[-1])[:end].addmm_(x.view(-1, x.shape[-1])[:end] @ a, b, alpha=-1)
        if routes.slices and self.versions:
            rows, out = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            for serial, start, end in routes.slices:
                pair = self.versions.get(serial)
                if pair is not None:
                    out[start:end].addmm_(rows[start:end] @ pair[0], pair[1])
        return y


class AdapterTable:
    """The adapter versions inside one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.routes = AdapterRoutes()
        self.merged = BASE_SERIAL
        """The version that is merged now."""
        self._modules: dict[int, list[AdapterLinear]] = {}

    def install(self, serial: int, weights: AdapterWeights) -> None:
        """Make a version servable; wraps target Linears that no adapter named before."""
        wrapped = [self._wrap(path) for path in weights.modules]
        for module, (a, b) in zip(wrapped, weights.modules.values(), strict=True):
            module.versions[serial] = (a, b)
        self._modules[serial] = wrapped

    def remove(self, serial: int) -> None:
        """Forget a version, which is not the merged one."""
        assert serial != self.merged, "the merged version stays until another is merged"
        for module in self._modules.pop(serial):
            del module.versions[serial]

    def __contains__(self, serial: int) -> bool:
        return serial == BASE_SERIAL or serial in self._modules

    def pairs(self, serial: int) -> list[tuple[AdapterLinear, Pair]]:
        """The Linears that a version names, with its terms; none where it is not installed."""
        return [(module, module.versions[serial]) for module in self._modules.get(serial, ())]

    def unmerge(self) -> None:
        """Run every step on the base weights, and free the merged ones."""
        for module in self._modules.get(self.merged, ()):
            module.merged = None
        self.merged = BASE_SERIAL

    def merge(self, serial: int, weights: Sequence[torch.Tensor]) -> None:
        """Take the merged weights of a version, one for each of its `pairs`. Nothing is merged before."""
        assert self.merged == BASE_SERIAL
        for (module, pair), weight in zip(self.pairs(serial), weights, strict=True):
            module.merged = Merged(weight, pair)
        self.merged = serial

    def order(self, serial: int) -> tuple[bool, int]:
        """Sort key of a step's tokens: the merged version's come last, so that all others are one slice."""
        return serial == self.merged, serial

    def route(self, serials: Sequence[int], starts: Sequence[int]) -> None:
        """Say whose the coming step's tokens are: run i, [starts[i], starts[i + 1]), is of serials[i], in `order`."""
        slices: list[tuple[int, int, int]] = []
        for i, serial in enumerate(serials):
            if slices and slices[-1][0] == serial:
                slices[-1] = (serial, slices[-1][1], starts[i + 1])
            elif serial != BASE_SERIAL:
                slices.append((serial, starts[i], starts[i + 1]))
        self.routes.num_unmerged = None
        if self.merged != BASE_SERIAL and slices and slices[-1][0] == self.merged:
            _, start, end = slices[-1]
            # On the merged weight `start` tokens get a low-rank term for it, on the base weight `end - start` do.
            if start < end - start:
                slices.pop()
                self.routes.num_unmerged = start
        self.routes.slices = slices

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
