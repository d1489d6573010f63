"""What a server answers before its model is there, on a socket whose name is known beforehand."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from nightschool_server.config.config import load_config
from nightschool_server.home import Home
from nightschool_server.serving import ServeOptions, serving

from tests.harness import ask, bearer, failure, stubs
from tests.server.scripted_engine import ScriptedEngine


async def test_health_answers_while_the_model_loads_and_calls_are_told_to_come_back(tmp_path: Path) -> None:
    loaded, ready, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def load() -> ScriptedEngine:
        await loaded.wait()
        return ScriptedEngine()

    home = Home(tmp_path / "home")
    # The path of a socket has at most 107 characters, which a test's own folder may exceed.
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/nightschool.sock"
        config = load_config(home, environ={}, overrides={"server.host": address})

        async def run() -> None:
            async with serving(home, config, ServeOptions(with_learner=False), load):
                ready.set()
                await stop.wait()

        server = asyncio.create_task(run())
        async with stubs(address) as wire, asyncio.timeout(60):
            watch = wire.health.Watch(health_pb2.HealthCheckRequest(service=""), wait_for_ready=True)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            admin = bearer(home.cli_token.read_text().strip())
            for call in (
                wire.agent.Generate(ask("hi"), metadata=admin),
                wire.agent.StreamGenerate(ask("hi"), metadata=admin).read(),
            ):
                found = await failure(call)
                assert (found.code, found.reason, found.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, "STARTING", 2.0)
            assert not home.server_file.exists()
            loaded.set()
            await ready.wait()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            assert (await wire.agent.Generate(ask("hi"), metadata=admin)).answers[0].text == "fine."
            assert home.server_file.exists()
            stop.set()
            await server
        assert not home.server_file.exists()
