"""Customers: streaming clients that ask, wait for the answer, and say whether they liked it.

Owns the counts that the demo promises: how many requests were served, how many failed, and which adapter
answered when. A failure is kept with its message, never retried into silence.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from types import TracebackType

from nightschool import AsyncClient, NightschoolError

from examples.shop.traffic import Request, traffic

THINK_S = 0.8
"""Mean pause of a customer between two requests."""
FEEDBACK_SHARE = 0.5
"""How many answers get a thumb."""


class LiveTraffic:
    """Customers at work between `async with` and its end."""

    def __init__(self, client: AsyncClient, num_clients: int, seed: int = 1) -> None:
        self._client = client
        self._requests = traffic(seed)
        self._num_clients = num_clients
        self._seed = seed
        self._changed = asyncio.Condition()
        self._customers: list[asyncio.Task[None]] = []
        self._closing = asyncio.Event()
        self.served = 0
        self.failures: list[str] = []
        self.right_by_adapter: Counter[str] = Counter()
        self.served_by_adapter: Counter[str] = Counter()

    async def __aenter__(self) -> LiveTraffic:
        self._customers = [
            asyncio.create_task(self._customer(random.Random(f"customer {self._seed} {number}")))
            for number in range(self._num_clients)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        await asyncio.gather(*self._customers)

    async def wait_for(self, num_served: int) -> None:
        """Until that many requests were answered or any failed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.served >= num_served or bool(self.failures))

    async def _customer(self, rng: random.Random) -> None:
        while not self._closing.is_set():
            await self._ask(next(self._requests), rng)
            await self._think(rng.expovariate(1 / THINK_S))

    async def _think(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            return

    async def _ask(self, request: Request, rng: random.Random) -> None:
        try:
            result = await self._client.run_task(
                request.prompt, images=request.images, temperature=0.0, learning="train"
            ).result()
            right = request.liked(result.answer)
            if rng.random() < FEEDBACK_SHARE:
                await self._client.feedback(result.response_id, good=right)
        except NightschoolError as error:
            self.failures.append(f"{type(error).__name__}: {error}")
        else:
            self.served += 1
            self.served_by_adapter[result.adapter] += 1
            self.right_by_adapter[result.adapter] += right
        async with self._changed:
            self._changed.notify_all()

    def lines(self) -> Iterator[str]:
        """How many were served and failed; per adapter, how many answers the customers found right."""
        yield f"live requests: {self.served} served, {len(self.failures)} failed"
        for adapter, num_served in self.served_by_adapter.items():
            yield f"{adapter}: {self.right_by_adapter[adapter]} of {num_served} answers right"
