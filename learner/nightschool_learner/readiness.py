"""What a cycle will need hours later, looked at before it begins: keys of endpoints, a judge that may judge,
a sandbox where files are made.

Each stage checks again what it needs. Owns no rule of its own: only that they are asked early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from nightschool_server.config.files import EmbedderConfig
from nightschool_server.config.roles import RoleConfig
from nightschool_server.errors import AppError

from nightschool_learner.endpoint import connect
from nightschool_learner.held_out import held_out_tasks
from nightschool_learner.judge import judge_fault
from nightschool_learner.stages import Cycle, Ending
from nightschool_learner.synthesis.workshop import open_maker_sandbox


async def check_ready(cycle: Cycle) -> Ending | None:
    """An Ending where the cycle could not be judged.

    Raises StageFailedError where an endpoint cannot be used, and where files are to be made without a sandbox.
    """
    is_judged = await asyncio.to_thread(_is_judged, cycle)
    if is_judged and (fault := judge_fault(cycle)):
        return Ending("stopped", fault)
    for role, config in _roles(cycle, is_judged=is_judged):
        if config.kind == "endpoint":
            await connect(config.endpoint, role).close()
    if cycle.config.synthesize.files.enabled:
        async with open_maker_sandbox(cycle):
            pass
    return None


def _is_judged(cycle: Cycle) -> bool:
    try:
        return held_out_tasks(cycle).is_judged
    except AppError:  # evaluation says so; the pairs of such a cycle are worth having
        return False


def _roles(cycle: Cycle, *, is_judged: bool) -> Iterator[tuple[str, RoleConfig | EmbedderConfig]]:
    """The roles that somebody will play, by name."""
    config = cycle.config
    yield "writer", config.synthesize
    if (files := config.synthesize.files).enabled:
        yield "captioner", files.captioner
        yield "file_maker", files.maker
        yield "embedder", files.embedder
    if config.synthesize.verifier.enabled:
        yield "verifier", config.synthesize.verifier
    if {"judge", "checklist"} & {*config.critic.kinds, *config.critic.vetoes}:
        yield "critic", config.critic
    if is_judged:
        yield "judge", config.gate.judge
