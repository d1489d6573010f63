"""Which pairs to leave out so that chosen answers are not longer, or shorter, than rejected ones on the whole.

A critic that likes long answers teaches length, whatever else it teaches (R-DPO, arXiv 2403.19159; SimPO, arXiv
2405.14734). Those correct the loss; here the data are matched, so that every loss is served. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

Lengths = tuple[int, int]
"""Tokens of the chosen and of the rejected answer."""


def stretched(lengths: Sequence[Lengths], max_ratio: float) -> frozenset[int]:
    """Indices of pairs to leave out so that sum(chosen) / sum(rejected) lies within [1 / max_ratio, max_ratio].

    Greedy: those that stretch it most go first, in either direction, until it holds. 0 leaves out none.
    """
    kept = set(range(len(lengths)))
    if max_ratio <= 0:
        return frozenset()
    while kept:
        chosen, rejected = (sum(lengths[i][side] for i in kept) for side in (0, 1))
        long, short = (0, 1) if chosen > rejected else (1, 0)
        excess = {i: lengths[i][long] - max_ratio * lengths[i][short] for i in kept}
        over = sum(excess.values())
        if over <= 1e-9:
            break
        for index in sorted(kept, key=lambda i: (-excess[i], i)):
            kept.remove(index)
            over -= excess[index]
            if over <= 1e-9:
                break
    return frozenset(range(len(lengths))) - kept
