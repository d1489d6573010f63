"""Where keys and values live: one slot per sequence, in tensors that grow as they are needed.

Owns the K/V tensors of every layer, and the token keys that say what each slot holds, so that a new
sequence can take over or copy the longest prefix that some slot already has. Does not decide who gets
a slot (see `scheduler.py`) nor how attention reads them (see `attention.py`).

Layout of a layer: keys and values [num_slots, capacity, kv_heads, head_dim]. Tokens before heads, so
that a step's new tokens are one `index_copy_` of rows, and attention reads a slot range as a view.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Cache

_SMALLEST_CAPACITY = 256


class SlotCache(Cache):  # type: ignore[misc]
    """A transformers cache whose `update` writes this step's tokens into their slots.

    `update` returns the layer's whole tensors; the attention function of `attention.py` picks views of
    the slots that step. `cells` [num_tokens] must be set before each forward: slot * capacity + position.
    """

    def __init__(self, max_slots: int, max_length: int) -> None:
        super().__init__(layers=[])
        self.max_slots = max_slots
        self.max_length = max_length
        self.capacity = 0
        self._num_used = 0
        """Slots [0, this) were ever written."""
        self.cells = torch.empty(0, dtype=torch.long)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    @property
    def size_bytes(self) -> int:
        """Bytes of all keys and values; on a CPU only what was touched is resident."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def reserve(self, num_slots: int, length: int) -> None:
        """Grow so that slots [0, num_slots) hold `length` tokens; contents stay, lengths at least double.

        Slots come all at once and lengths as needed: what no sequence has touched costs no memory on a CPU.
        """
        if length > self.capacity:
            capacity = min(self.max_length, max(length, 2 * self.capacity, _SMALLEST_CAPACITY))
            for tensors in (self._keys, self._values):
                for i, old in enumerate(tensors):
                    new = _zeros((self.max_slots, capacity, *old.shape[2:]), old)
                    new[: self._num_used, : self.capacity] = old[: self._num_used]
                    tensors[i] = new
            self.capacity = capacity
        self._num_used = max(self._num_used, num_slots)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another, in every layer."""
        self.reserve(target + 1, length)
        for tensor in (*self._keys, *self._values):
            tensor[target, :length] = tensor[source, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [1, kv_heads, num_tokens, head_dim] at `cells`; return the layer's tensors."""
        if layer_idx == len(self._keys):
            for tensors, states in ((self._keys, key_states), (self._values, value_states)):
                shape = (self.max_slots, self.capacity, states.shape[1], states.shape[3])
                tensors.append(_zeros(shape, states))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys.view(-1, *keys.shape[2:]).index_copy_(0, self.cells, key_states[0].transpose(0, 1))
        values.view(-1, *values.shape[2:]).index_copy_(0, self.cells, value_states[0].transpose(0, 1))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Sequences have lengths of their own; nothing in the served forward asks for this one."""
        del layer_idx
        return 0


class PrefixIndex:
    """Which token keys each slot holds, and the longest prefix that a new sequence shares with each.

    A key is a token id, or for an image's placeholder a negative hash of the image, so that equal keys
    mean equal inputs. A slot's keys count only for the adapter version (`serial`) that computed them.
    """

    def __init__(self, num_slots: int) -> None:
        self._keys = np.zeros((num_slots, 256), dtype=np.int64)
        self._num_computed = np.zeros(num_slots, dtype=np.int64)
        self._num_planned = np.zeros(num_slots, dtype=np.int64)
        self._serials = np.full(num_slots, -1, dtype=np.int64)

    def plan(self, slot: int, serial: int, keys: NDArray[np.int64], num_computed: int) -> None:
        """Slot now belongs to a sequence that will compute `keys`, of which `num_computed` are there."""
        if len(keys) > self._keys.shape[1]:
            wider = np.zeros((len(self._keys), max(len(keys), 2 * self._keys.shape[1])), dtype=np.int64)
            wider[:, : self._keys.shape[1]] = self._keys
            self._keys = wider
        self._keys[slot, : len(keys)] = keys
        self._serials[slot] = serial
        self._num_computed[slot] = num_computed
        self._num_planned[slot] = len(keys)

    def computed(self, slot: int, num_computed: int) -> None:
        """The first `num_computed` planned keys of a slot are in the cache now; keys beyond the plan do not count."""
        self._num_computed[slot] = min(num_computed, int(self._num_planned[slot]))

    def retain(self, slot: int, keys: NDArray[np.int64]) -> None:
        """The sequence of a slot has left; what it computed (`keys`, all of it) stays for others."""
        self.plan(slot, int(self._serials[slot]), keys, len(keys))

    def forget_adapter(self, serial: int) -> None:
        """Drop the contents of every slot that an adapter version computed."""
        self._serials[self._serials == serial] = -1

    def num_computed(self, slot: int) -> int:
        """Tokens of a slot that are in the cache."""
        return int(self._num_computed[slot])

    def match(self, serial: int, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens that each slot shares with `keys` from the start: (in the cache now, once it has prefilled)."""
        width = min(len(keys), self._keys.shape[1])
        if width == 0:
            zeros = np.zeros(len(self._keys), dtype=np.int64)
            return zeros, zeros
        differs = self._keys[:, :width] != keys[:width]
        shared = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
        shared[self._serials != serial] = 0
        return np.minimum(shared, self._num_computed), np.minimum(shared, self._num_planned)


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of the dtype and device of `like`; on a CPU from calloc, whose pages exist once they are written.

    Zeros and not garbage: attention masks what it must not see by adding -inf, which would keep a NaN.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    raw = np.zeros(int(np.prod(shape)) * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(raw).view(like.dtype).view(shape)
