"""The scripted server and the two clients on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from nightschool import AsyncClient, Client, RetryPolicy

from tests.client.fake_replies import DEFAULTS
from tests.client.fake_server import TOKEN, WAIT_S, FakeServer

FAST = RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.002)
DEADLINE_S = 2 * WAIT_S
"""Of a call: what ends one before that is what the test is about."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(defaults=DEFAULTS) as started:
        yield started


@pytest.fixture
def client(server: FakeServer, tmp_path: Path) -> Iterator[Client]:
    with Client(server.address, token=TOKEN, home=tmp_path, retry=FAST, timeout_s=DEADLINE_S) as made:
        yield made


@pytest.fixture
async def aclient(server: FakeServer, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, token=TOKEN, home=tmp_path, retry=FAST, timeout_s=DEADLINE_S) as made:
        yield made
