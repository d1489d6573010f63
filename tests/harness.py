"""Real servers for tests: in this process on a thread with an event loop of its own, or as a process.

A server thread serves on port 0 of loopback; tests talk to it through real channels from their own loops. What a test
needs beyond the wire (the runtime's counters) it reads from `runtime`, which is only read, never changed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from nightschool_proto.v1 import admin_pb2_grpc, agent_pb2, agent_pb2_grpc, content_pb2
from nightschool_server.auth import Tokens
from nightschool_server.config.config import load_config
from nightschool_server.home import Home
from nightschool_server.runtime import Runtime
from nightschool_server.serving import ServeOptions, Serving, StartEngine, serving

ROOT = Path(__file__).resolve().parents[1]
SHOP_MODEL = ROOT / "examples" / "shop" / "model"
START_S = 300.0

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Running:
    """A server that serves, and the tokens to call it."""

    address: str
    home: Path
    runtime: Runtime
    user: Metadata
    other_user: Metadata
    admin: Metadata

    @asynccontextmanager
    async def stubs(self) -> AsyncIterator[Stubs]:
        """Stubs on a channel of the caller's event loop."""
        async with stubs(self.address) as found:
            yield found


@dataclass(frozen=True)
class Stubs:
    """Both services on one channel."""

    agent: agent_pb2_grpc.AgentServiceAsyncStub
    admin: admin_pb2_grpc.AdminServiceAsyncStub
    health: Any
    channel: grpc.aio.Channel


@asynccontextmanager
async def stubs(address: str) -> AsyncIterator[Stubs]:
    """Stubs for the server at `address`."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield Stubs(
            agent_pb2_grpc.AgentServiceStub(channel),  # type: ignore[arg-type]
            admin_pb2_grpc.AdminServiceStub(channel),  # type: ignore[arg-type]
            health_pb2_grpc.HealthStub(channel),
            channel,
        )


@contextmanager
def server_thread(
    home: Path, settings: Mapping[str, str] | None = None, engine: StartEngine | None = None
) -> Iterator[Running]:
    """A server on `home` in a thread, without a learner, until the block ends."""
    ready: list[Serving] = []
    failed: list[BaseException] = []
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    overrides = {"server.port": "0", "engine.model": str(SHOP_MODEL), "server.drain_s": "1", **(settings or {})}

    async def run() -> None:
        config = load_config(Home(home), environ={}, overrides=overrides)
        async with serving(Home(home), config, ServeOptions(with_learner=False), engine) as server:
            ready.append(server)
            started.set()
            await stop.wait()

    def target() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(run())
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()
            loop.close()

    thread = threading.Thread(target=target, name="server", daemon=True)
    thread.start()
    assert started.wait(START_S), "the server did not start"
    if failed:
        raise failed[0]
    try:
        yield _running(home, ready[0])
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        thread.join(START_S)
    if failed:
        raise failed[0]


def _running(home: Path, server: Serving) -> Running:
    return Running(
        server.address,
        home,
        server.runtime,
        user=bearer(_token(server.runtime.tokens, home, "alice")),
        other_user=bearer(_token(server.runtime.tokens, home, "bob")),
        admin=bearer((home / "cli.token").read_text().strip()),
    )


def _token(tokens: Tokens, home: Path, name: str) -> str:
    """A user token, the same one for every server on this home."""
    kept = home / f"{name}.token"
    if not kept.exists():
        kept.write_text(tokens.create(name, "user"))
    return kept.read_text()


def bearer(token: str) -> Metadata:
    """The metadata of a call with `token`."""
    return (("authorization", f"Bearer {token}"),)


class ServerProcess:
    """`python -m nightschool_server serve` as a process of its own; use as a context."""

    def __init__(self, home: Path, *arguments: str, folder: Path = ROOT) -> None:
        """`folder` is where it is started, and looks for its application."""
        self.home = home
        self.lines: list[str] = []
        self._serving = threading.Event()
        self._process = subprocess.Popen(
            serve_command(home, *arguments), cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        if not self._serving.wait(START_S) or self._process.poll() is not None:
            self._process.kill()
            raise AssertionError("the server did not start: " + "".join(self.lines))
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        self._reader.join(START_S)
        assert self._process.stderr is not None
        self._process.stderr.close()

    @property
    def address(self) -> str:
        """Where it serves."""
        return str(json.loads((self.home / "server.json").read_text())["address"])

    @property
    def admin(self) -> Metadata:
        """The metadata of the command line's token."""
        return bearer((self.home / "cli.token").read_text().strip())

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL; nothing is said goodbye to."""
        self._process.kill()
        self._process.wait(START_S)

    def terminate(self) -> None:
        """SIGTERM; see `wait`."""
        self._process.terminate()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(START_S)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            if line.startswith("serving "):
                self._serving.set()
        self._serving.set()


def serve_command(home: Path, *arguments: str) -> list[str]:
    """The command line of a server on `home` with the shop's model on a free port."""
    defaults = ["--model", str(SHOP_MODEL), "--port", "0"]
    return [sys.executable, "-m", "nightschool_server", "serve", "--home", str(home), *defaults, *arguments]


@dataclass(frozen=True)
class Failure:
    """A failed call as its status tells it."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str
    resource: str
    retry_after_s: float | None


async def failure(call: Awaitable[Any]) -> Failure:
    """What a call that must fail says."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return _failure_of(error)
    raise AssertionError("the call did not fail")


def _failure_of(error: grpc.aio.AioRpcError) -> Failure:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    resource, retry = error_details_pb2.ResourceInfo(), error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(retry):
                    retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
                detail.Unpack(info), detail.Unpack(bad), detail.Unpack(resource)
    fields = [violation.field for violation in bad.field_violations]
    return Failure(
        error.code(),
        error.details() or "",
        info.reason,
        fields[0] if fields else "",
        resource.resource_name,
        retry_after_s,
    )


def ask(text: str, **fields: Any) -> agent_pb2.GenerateRequest:
    """A greedy request with one user turn; `sampling` fields by name, everything else as in the proto."""
    names = content_pb2.Sampling.DESCRIPTOR.fields_by_name
    sampling = {"max_tokens": 8, "temperature": 0.0}
    sampling.update({name: fields.pop(name) for name in list(fields) if name in names})
    messages = fields.pop("messages", None) or [
        content_pb2.Message(role=content_pb2.Message.USER, parts=[content_pb2.Part(text=text)])
    ]
    return agent_pb2.GenerateRequest(messages=messages, sampling=content_pb2.Sampling(**sampling), **fields)
