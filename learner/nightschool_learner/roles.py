"""Who plays a role of a cycle: the task writer, the critic, the gate's judge, and whatever role comes next.

    async with open_role(cycle, "writer", cycle.config.synthesize, sampler) as model:
        samples = await model.sampler.sample(prompt, sampling, adapter=model.adapter)

Owns the choice between the served model and an endpoint. A stage that has a model in a role asks here, and so gets
limits, retries and the accounting of `endpoint.py` without knowing of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from nightschool_server.config.roles import RoleConfig
from nightschool_server.uninterrupted import uninterrupted

from nightschool_learner.endpoint import Endpoint
from nightschool_learner.endpoint_records import EndpointCall, insert_call
from nightschool_learner.sampling import AnswerSampler, until_resumed
from nightschool_learner.stages import Cycle


@dataclass(frozen=True)
class Model:
    """What plays a role."""

    sampler: AnswerSampler
    adapter: str
    """To be named in every call; an endpoint ignores it."""
    name: str
    """Who it is, in rows and reports: `served/ADAPTER` or `MODEL@BASE_URL`."""
    is_served: bool
    has_odds: bool
    """Whether answers carry the odds of their tokens."""
    prompt_price: float = 0.0
    completion_price: float = 0.0
    """Of a million tokens."""

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Of one answer."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


@asynccontextmanager
async def open_role(cycle: Cycle, role: str, config: RoleConfig, served: AnswerSampler) -> AsyncIterator[Model]:
    """The model that `config` names, for as long as the block runs; `served` samples the served one.

    Raises StageFailedError where an endpoint cannot be used.
    """
    if config.kind == "served":
        adapter = cycle.adapter_of(config.adapter)
        yield Model(served, adapter, f"served/{adapter}", True, True)
        return

    async def record(call: EndpointCall) -> None:
        await uninterrupted(asyncio.to_thread(insert_call, cycle.store, call))

    endpoint = Endpoint(
        config.endpoint,
        role,
        cycle.store.get_blob,
        record,
        cycle.id or None,
        until_allowed=partial(until_resumed, cycle),
    )
    name = f"{config.endpoint.model}@{config.endpoint.base_url}"
    async with endpoint as sampler:
        prices = (config.endpoint.prompt_price, config.endpoint.completion_price)
        yield Model(sampler, "", name, False, config.endpoint.has_logprobs, *prices)
