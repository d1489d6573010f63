"""What a call of a tool changes, and what follows: it runs, a simulator answers in its place, or it is refused.

The one place that decides. Every executor asks it, whoever brought the tool.
"""

from __future__ import annotations

from typing import Literal, get_args

Effect = Literal["read_only", "workspace", "external"]
"""What a call changes: nothing, only the task's own state and files, or the world outside."""

EFFECTS: frozenset[Effect] = frozenset(get_args(Effect))

Purpose = Literal["live", "practice"]
"""What a call is for: a caller's own task, or practice and held-out evaluation, which try a task many times."""

Conduct = Literal["run", "simulate", "refuse"]
"""What becomes of a call."""


def conduct_of(effect: Effect, purpose: Purpose, *, can_simulate: bool) -> Conduct:
    """What becomes of a call. Practice never changes the world outside: it asks the simulator, where there is one."""
    if purpose == "live" or effect != "external":
        return "run"
    return "simulate" if can_simulate else "refuse"


def refusal(name: str, effect: Effect) -> str:
    """What the model reads where its call is refused."""
    return f"tool {name!r} has {effect} effects and is not run in practice"
