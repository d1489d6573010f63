"""A running server, from its home folder to the last answered call.

Owns the order: lock, store, port, application, tool workers, engine, adapters, then health says SERVING; and the way
back on drain: NOT_SERVING, no new call, those in flight to their end, the log to the disk, the engine closed. Whatever
fails on the way up, what was started is stopped in reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from nightschool_server.adapters.registry import AdapterRegistry
from nightschool_server.agent.call_forms import strict_fault
from nightschool_server.agent.formats import call_form, open_format
from nightschool_server.agent.limits import call_limits
from nightschool_server.agent.toolbox import Toolbox, open_tools
from nightschool_server.app import App, load_app
from nightschool_server.auth import Tokens
from nightschool_server.call_form_choice import with_call_form
from nightschool_server.config.config import Config, to_environment
from nightschool_server.counters import Counters
from nightschool_server.distribution import version
from nightschool_server.engine import Engine
from nightschool_server.engine_factory import start_engine
from nightschool_server.errors import AppError, FailedPreconditionError, NotFoundError
from nightschool_server.home import Home
from nightschool_server.learner_process import LearnerProcess
from nightschool_server.runtime import Runtime, image_limits_of
from nightschool_server.service.admin_service import AdminService
from nightschool_server.service.agent_service import AgentService
from nightschool_server.service.grpc_port import GrpcPort
from nightschool_server.service.images import Images
from nightschool_server.service.interceptors import CallInterceptor, Limits
from nightschool_server.store.durable import write_file
from nightschool_server.store.redact import redactor_of
from nightschool_server.store.request_log import RequestLog
from nightschool_server.store.store import Store

log = logging.getLogger(__name__)

LOCK_FILE = "server.lock"
"""Held for as long as a server runs on the home; the kernel lets go of it whatever becomes of the process."""

HEALTH_S = 0.2
"""How often the engine's life is looked at, seconds."""

StartEngine = Callable[[], Awaitable[Engine]]


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says beside the configuration."""

    with_learner: bool = True
    overrides: Mapping[str, str] = field(default_factory=dict)
    """The command line's settings, for the learner, which resolves its configuration itself."""


@dataclass(frozen=True)
class Serving:
    """A server that serves."""

    address: str
    runtime: Runtime
    learner: LearnerProcess | None


@asynccontextmanager
async def serving(
    home: Home, config: Config, options: ServeOptions | None = None, engine: StartEngine | None = None
) -> AsyncIterator[Serving]:
    """A server on `home` for as long as the block runs, drained at its end.

    Raises ConfigError, ModelFormatError, AppError, FailedPreconditionError: each a sentence for whoever started it.
    """
    options = options or ServeOptions()
    config = with_call_form(config)
    async with AsyncExitStack() as stack:
        stack.enter_context(locked(home.create()))
        # One that a killed server left behind would send clients to nobody.
        home.server_file.unlink(missing_ok=True)
        # Of its tasks, whose files nobody may keep.
        shutil.rmtree(home.workspaces, ignore_errors=True)
        store = Store.open(home)
        stack.callback(store.close)
        tokens = Tokens(store)
        tokens.ensure_home_tokens(home)
        counters = Counters()
        port = GrpcPort(config.server, [CallInterceptor(tokens, limits_of(config), counters)])
        stack.push_async_callback(port.close)
        await port.start()
        app, tools = await _application(config, stack)
        action_format = await stack.enter_async_context(open_format(config.agent))
        action_format.check(tools.tools)
        may_sleep = config.learner.train.placement == "sleep"
        running = await (engine() if engine is not None else start_engine(config.engine, may_sleep=may_sleep))
        stack.push_async_callback(running.close)
        request_log = RequestLog(
            store,
            config.log.queue_size,
            redactor_of(config.log.redact),
            keep_uploads_s=config.agent.keep_uploads_s,
        )
        stack.push_async_callback(asyncio.to_thread, request_log.close)
        registry = await _registry(home, store, running, config, stack)
        images = Images(lambda sha256: _blob(store, sha256))
        runtime = Runtime(
            home, config, store, tokens, running, registry, request_log, images, app, tools, action_format, counters
        )
        await port.open(AgentService(runtime), AdminService(runtime))
        stack.push_async_callback(
            _cancelled, asyncio.create_task(_follow_engine(port, running, counters), name="engine_health")
        )
        learner = _learner(home, store, config, options, app)
        if learner is not None:
            stack.push_async_callback(learner.stop)
        stack.enter_context(_server_file(home, port.address))
        try:
            yield Serving(port.address, runtime, learner)
        finally:
            log.info("event=draining address=%s drain_s=%g", port.address, config.server.drain_s)
            await asyncio.gather(
                port.drain(config.server.drain_s, counters.idle), *([learner.stop()] if learner else [])
            )
            log.info("event=drained")


def limits_of(config: Config) -> Limits:
    """What every call is held to."""
    server = config.server
    return Limits(
        default_deadline_s=server.default_deadline_s,
        max_deadline_s=server.max_deadline_s,
        max_in_flight=server.max_concurrent_requests,
        max_message_bytes=server.max_message_bytes,
    )


@contextmanager
def locked(home: Home) -> Iterator[None]:
    """Hold the home for this process. Raises FailedPreconditionError while another server has it."""
    path = home.path / LOCK_FILE
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise FailedPreconditionError(
                f"another server (pid {owner}) runs on {home.path}: stop it, or give this one a home of its own "
                "with --home"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


async def _application(config: Config, stack: AsyncExitStack) -> tuple[App | None, Toolbox]:
    if not config.app:
        return None, Toolbox()
    app, agent = load_app(config.app), config.agent
    limits = call_limits(agent, image_limits_of(config))
    opening = open_tools(app, config.app, num_workers=agent.num_tool_workers, limits=limits)
    tools = await stack.enter_async_context(opening)
    if fault := strict_fault(call_form(agent), tools.tools):
        raise AppError(f"app {config.app!r}: {fault}")
    return app, tools


async def _registry(home: Home, store: Store, engine: Engine, config: Config, stack: AsyncExitStack) -> AdapterRegistry:
    registry = AdapterRegistry(store, home, engine, config)
    await registry.start()
    stack.push_async_callback(registry.close)
    return registry


async def _follow_engine(port: GrpcPort, engine: Engine, counters: Counters) -> None:
    """Have health say whether the engine serves."""
    said = True
    while True:
        await asyncio.sleep(HEALTH_S)
        serves = engine.healthy() and not counters.is_lent
        if serves != said:
            said = serves
            log.warning("event=health_changed serving=%s reason=engine", said)
            await port.set_serving(said)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _blob(store: Store, sha256: str) -> bytes | None:
    try:
        return store.get_blob(sha256)
    except NotFoundError:
        return None


def _learner(home: Home, store: Store, config: Config, options: ServeOptions, app: App | None) -> LearnerProcess | None:
    if not (options.with_learner and config.learner.enabled):
        return None
    if app is None:
        log.info("event=learner_left_out reason=no_application remedy=--app")
        return None

    def note(why: str) -> None:
        with store.transaction() as db:
            db.execute("UPDATE learner SET last_error = ? WHERE id = 1", (why,))

    learner = LearnerProcess(home.path, to_environment(options.overrides), note)
    learner.start()
    return learner


@contextmanager
def _server_file(home: Home, address: str) -> Iterator[None]:
    """`server.json`, which says to clients on this machine where the server is."""
    entry = {"address": address, "pid": os.getpid(), "version": version()}
    write_file(home.server_file, json.dumps(entry).encode())
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            home.server_file.unlink()
