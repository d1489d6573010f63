"""One real server for all tests that do not need one of their own: loading a model takes seconds."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec

import pytest

# Before anything imports the hub's client: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


from tests.harness import Running, Stubs, server_thread

# Tests of the engine on vLLM run where vLLM is, in an environment of its own: `make test-vllm`.
collect_ignore = [] if find_spec("vllm") else ["on_vllm"]


@pytest.fixture(scope="session")
def shop_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The shop's model behind both services, without an application and without a learner."""
    with server_thread(tmp_path_factory.mktemp("shop") / "home") as running:
        yield running


@pytest.fixture
async def shop(shop_server: Running) -> AsyncIterator[Stubs]:
    """Stubs for `shop_server` on this test's event loop."""
    async with shop_server.stubs() as found:
        yield found
