"""Which samples a step takes: at which temperatures, in which calls, and how many before anybody looks at them.

Owns the plan alone, from the configuration; `practice.py` follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nightschool_server.config.practice import ExploreConfig


@dataclass(frozen=True)
class Group:
    """Samples of one temperature, which one call asks for: they share a prefill."""

    kind: str
    """What tells their stream of randomness from those of a step's other kinds."""
    temperature: float
    positions: tuple[int, ...]
    """Among the step's samples."""
    num_before: int
    """Samples of the same kind in earlier rounds: where this call's part of the stream begins."""


def rounds_of(config: ExploreConfig) -> list[list[Group]]:
    """The groups of each round of a step: one round; with `adaptive_after` a second for where the first disagrees.

    A sample is the same whichever round it falls into, so that a step whose candidates disagree is the step that it
    would have been without rounds.
    """
    kinds = [("cold", config.cold_temperature)] + [("hot", config.hot_temperature)] * (config.num_candidates - 1)
    if config.temperatures:
        kinds = [(f"{temperature:g}", temperature) for temperature in config.temperatures]
    first = config.adaptive_after or len(kinds)
    bounds = [(0, first), *([(first, len(kinds))] if first < len(kinds) else [])]
    return [_groups(kinds, start, end) for start, end in bounds]


def _groups(kinds: list[tuple[str, float]], start: int, end: int) -> list[Group]:
    groups = []
    for kind, temperature in dict.fromkeys(kinds[start:end]):
        positions = tuple(i for i in range(start, end) if kinds[i] == (kind, temperature))
        groups.append(Group(kind, temperature, positions, kinds[:start].count((kind, temperature))))
    return groups
