"""Moving the merged lane: which adapter version runs merged into the weights.

Owns the order of a move: the merged weights in memory are dropped, the new ones are made on a thread of the pool, the
owner thread takes them between two steps. So there is never more than one copy, nothing pauses, and no step sees half
of a move; until it is over everything runs unmerged. What a step does with them is `lora.py`'s.

Sequences that run, and prefixes that are kept, stay valid through a move: keys and values go by the version's serial,
and are the same, to rounding, merged or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

import torch

from nightschool_server.engines.loop import EngineLoop
from nightschool_server.engines.lora import AdapterLinear, AdapterTable, Pair
from nightschool_server.errors import UnknownAdapterError


class MergedLane:
    """The merged version of one model."""

    def __init__(self, loop: EngineLoop, adapters: AdapterTable, pool: Executor) -> None:
        self._loop, self._adapters, self._pool = loop, adapters, pool
        self._moving = asyncio.Lock()

    @property
    def serial(self) -> int:
        """The version that is merged now."""
        return self._adapters.merged

    async def move(self, name: str, serial: int) -> None:
        """Merge a version, `name` by name; the base's serial merges none.

        Moves wait for each other. Raises UnknownAdapterError where it was unloaded meanwhile; then, as after any
        error, nothing is merged.
        """
        async with self._moving:
            if serial == self._adapters.merged:
                return
            pairs: list[tuple[AdapterLinear, Pair]] = []

            def leave() -> None:
                self._adapters.unmerge()
                pairs.extend(self._adapters.pairs(serial))

            def take() -> None:
                if serial not in self._adapters:
                    raise UnknownAdapterError(name)
                self._adapters.merge(serial, weights)

            await self._loop.call(leave)
            weights = await asyncio.get_running_loop().run_in_executor(self._pool, merged_weights, pairs)
            await self._loop.call(take)


def merged_weights(pairs: Sequence[tuple[AdapterLinear, Pair]]) -> list[torch.Tensor]:
    """W + (A' B')^T of each Linear, added up in float32 and rounded once to the dtype of W.

    On any thread: it reads what is never written, the base weights and a version's terms.
    """
    merged: list[torch.Tensor] = []
    with torch.inference_mode():
        for module, (a, b) in pairs:
            base = module.base.weight
            merged.append(torch.addmm(base.float(), b.float().T, a.float().T).to(base.dtype))
    return merged
