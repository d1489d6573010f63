"""The command line of the server process: serve, and the tokens of a home folder.

Owns arguments, logging and signals. A user's mistake is one sentence on stderr and exit code 2. What runs is
`serving.py`'s. stdout is results, stderr is everything else.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from nightschool_server.auth import Tokens
from nightschool_server.config.config import load_config, split_overrides
from nightschool_server.errors import AppError, NightschoolError
from nightschool_server.findings import Finding, as_dicts, as_text, has_fault
from nightschool_server.home import Home
from nightschool_server.store.store import Store

log = logging.getLogger(__name__)

USER_MISTAKE = 2

EXAMPLE = """example:
  nightschool serve --model examples/shop/model --app examples.shop.app:app
  nightschool doctor --model examples/shop/model
  nightschool check examples.shop.app:app --model examples/shop/model
  nightschool token create alice --scope user"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; flags alone mean `serve`. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        words.insert(0, "serve")
    options = _parser().parse_args(words)
    _configure_logging(verbose=getattr(options, "verbose", False))
    home = Home(Path(options.home).expanduser().absolute())
    commands = {
        "serve": _serve,
        "doctor": _doctor,
        "check": _check,
        "create": _create_token,
        "list": _list_tokens,
        "revoke": _revoke_token,
    }
    try:
        return commands[options.command](home, options)
    except NightschoolError as error:
        print(f"nightschool: {error}", file=sys.stderr)  # noqa: T201
        return USER_MISTAKE


def _serve(home: Home, options: argparse.Namespace) -> int:
    overrides = _overrides(options)
    config = load_config(home, overrides=overrides)
    from nightschool_server.serving import ServeOptions, serving

    async def run() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        starting = asyncio.current_task()
        assert starting is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            # While the model loads there is nothing to drain.
            loop.add_signal_handler(number, starting.cancel)
        async with serving(home, config, ServeOptions(not options.no_learner, overrides)) as server:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stopping.set)
            # A full collection took 150 ms, in which nobody was answered: those to come leave out what the start made.
            gc.collect()
            gc.freeze()
            model, adapter = config.engine.model, server.runtime.registry.active
            print(f"serving {model} on {server.address} (adapter {adapter})", file=sys.stderr, flush=True)  # noqa: T201
            await stopping.wait()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run())
    except asyncio.CancelledError:
        log.info("event=stopped_while_starting")
    return 0


def _doctor(home: Home, options: argparse.Namespace) -> int:
    config = load_config(home, overrides=_overrides(options))
    from nightschool_server import doctor

    logging.getLogger("vllm").setLevel(logging.ERROR)
    _quiet_transformers()
    return _report(doctor.examine(home, config), as_json=options.json)


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()


def _check(home: Home, options: argparse.Namespace) -> int:
    config = load_config(home, overrides=_overrides(options))
    if not all(config.app.partition(":")):
        named = f"app {config.app!r} must be written module:attribute" if config.app else "no application is named"
        raise AppError(f"{named}: nightschool check app:app, or set agent.app")
    from nightschool_server import check

    if config.engine.model:
        _quiet_transformers()
    return _report(check.examine(config), as_json=options.json)


def _report(findings: list[Finding], *, as_json: bool) -> int:
    print(json.dumps(as_dicts(findings), indent=1) if as_json else as_text(findings))  # noqa: T201
    return int(has_fault(findings))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed, which comes with vLLM; asyncio's own otherwise."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _create_token(home: Home, options: argparse.Namespace) -> int:
    with closing(Store.open(home)) as store:
        print(Tokens(store).create(options.name, options.scope))  # noqa: T201
    return 0


def _list_tokens(home: Home, options: argparse.Namespace) -> int:
    with closing(Store.open(home, migrate=False)) as store:
        for token in Tokens(store).list():
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(token.created_at))
            state = "valid" if token.revoked_at is None else "revoked"
            print(f"{token.name}\t{token.scope}\t{made}\t{state}")  # noqa: T201
    return 0


def _revoke_token(home: Home, options: argparse.Namespace) -> int:
    with closing(Store.open(home, migrate=False)) as store:
        Tokens(store).revoke(options.name)
    return 0


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    """The flags as settings; a `--set` of the same key wins."""
    flags = {
        "engine.model": options.model,
        "engine.kind": getattr(options, "engine", None),
        "agent.app": options.app,
        "server.host": getattr(options, "host", None),
        "server.port": getattr(options, "port", None),
        "agent.unsafe_code": "true" if getattr(options, "unsafe_code", False) else None,
    }
    # The learner resolves its configuration in another process, perhaps from another folder.
    if options.model and Path(options.model).expanduser().is_dir():
        flags["engine.model"] = str(Path(options.model).expanduser().absolute())
    return {key: str(value) for key, value in flags.items() if value is not None} | split_overrides(options.settings)


def _parser() -> argparse.ArgumentParser:
    home = argparse.ArgumentParser(add_help=False)
    home.add_argument(
        "--home",
        default=os.environ.get("NIGHTSCHOOL_HOME", "~/.nightschool"),
        metavar="DIR",
        help="folder for everything the server keeps (default: $NIGHTSCHOOL_HOME or ~/.nightschool)",
    )
    parser = argparse.ArgumentParser(
        prog="nightschool",
        description="Serve a model with LoRA adapters over gRPC.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        parents=[home],
        help="serve until SIGTERM",
        description="Serve until SIGTERM.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_serve(serve)
    examined = commands.add_parser(
        "doctor",
        parents=[home],
        help="say what this machine can serve and where it can train",
        description="Say what this machine can serve and where it can train, and why not. Changes nothing; exit code 1 "
        "where serving as configured would fail.",
        epilog="example:\n  nightschool doctor --model examples/shop/model --app examples.shop.app:app",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_settings(examined)
    examined.add_argument("--json", action="store_true", help="print the findings as JSON")
    _add_check(commands, home)
    tokens = commands.add_parser("token", help="make, list and revoke tokens", description="Tokens of a home folder.")
    actions = tokens.add_subparsers(dest="command", required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[home], help="make a token and print it; it is not shown again")
    create.add_argument("name", help="who it is for; requests are logged under this name")
    create.add_argument("--scope", choices=("user", "admin"), default="user", help="what it may call (default: user)")
    actions.add_parser("list", parents=[home], help="name, scope, date and state of every token, tab-separated")
    actions.add_parser("revoke", parents=[home], help="refuse a token from now on").add_argument("name")
    return parser


def _add_check(commands: Any, home: argparse.ArgumentParser) -> None:
    checked = commands.add_parser(
        "check",
        parents=[home],
        help="say what is wrong with an application before it serves",
        description="Say what is wrong with an application, and with a model for it, before it serves. Changes "
        "nothing; exit code 1 where something is wrong.",
        epilog="example:\n  nightschool check examples.shop.app:app --model examples/shop/model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checked.add_argument("app", nargs="?", metavar="MODULE:ATTR", help="the application (default: agent.app)")
    checked.add_argument("--model", metavar="PATH", help="model folder or hub id whose chat template is tried")
    _add_set(checked)
    checked.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_settings(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--model", metavar="PATH", help="model folder or hub id (engine.model)")
    serve.add_argument("--app", metavar="MODULE:ATTR", help="the application that brings tools (agent.app)")
    serve.add_argument("--host", help="address to listen on (server.host; default: loopback)")
    serve.add_argument("--port", type=int, help="port to listen on, 0 for any free one (server.port)")
    serve.add_argument("--engine", metavar="KIND", help="which engine runs the model (engine.kind)")
    _add_set(serve)


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="SECTION.KEY=VALUE",
        help="any other setting of config.toml, e.g. --set server.drain_s=5; may be repeated",
    )


def _add_serve(serve: argparse.ArgumentParser) -> None:
    _add_settings(serve)
    serve.add_argument("--no-learner", action="store_true", help="serve only; `nightschool learn` runs the learner")
    serve.add_argument(
        "--unsafe-code",
        action="store_true",
        help="run the model's code without a sandbox where there is none, with every right of this user",
    )
    serve.add_argument("--verbose", action="store_true", help="log every call")


class _CallIds(logging.Filter):
    """Puts the id of the call that a line belongs to at its end."""

    def filter(self, record: logging.LogRecord) -> bool:
        from nightschool_server.service.interceptors import CURRENT_CALL

        call = CURRENT_CALL.get(None)
        record.call = "" if call is None or "call=" in str(record.msg) else f" call={call.id}"
        return True


def _configure_logging(*, verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s level=%(levelname)s logger=%(name)s %(message)s%(call)s"))
    handler.addFilter(_CallIds())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("nightschool_server").setLevel(logging.DEBUG if verbose else logging.INFO)
