"""`serve`, `doctor`, `check`, `learn`, `train` and `token`: this process becomes one of the server's or the learner's.

Arguments are passed through. The client imports neither package: it looks whether the extra is installed and calls
exec.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from nightschool.cli.root import Target
from nightschool.config import environment_of, home_folder

NEEDED = {
    "server": ("nightschool_server", "torch", "transformers", "pydantic", "sqlite_utils"),
    "learner": ("nightschool_learner", "torch", "trl", "peft", "apscheduler"),
}
"""Modules that tell whether an extra is installed; the house's own packages come with every install."""

PASS_THROUGH: dict[str, Any] = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}


@click.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def serve(target: Target, *, arguments: Sequence[str]) -> None:
    """Serve a model and let it learn; `nightschool serve --help` shows the server's own options.

    Example: nightschool serve --model examples/shop/model --app examples.shop.app:app
    """
    _become("server", "nightschool_server", target, ["serve", *arguments])


@click.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def doctor(target: Target, *, arguments: Sequence[str]) -> None:
    """Say what this machine can serve and where it can train.

    Example: nightschool doctor --model examples/shop/model
    """
    _become("server", "nightschool_server", target, ["doctor", *arguments])


@click.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def check(target: Target, *, arguments: Sequence[str]) -> None:
    """Say what is wrong with an application, and with a model for it, before it serves.

    Example: nightschool check examples.shop.app:app --model examples/shop/model
    """
    _become("server", "nightschool_server", target, ["check", *arguments])


@click.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def learn(target: Target, *, arguments: Sequence[str]) -> None:
    """Run the learner alone, beside a server started with --no-learner.

    Example: nightschool learn --home /srv/nightschool
    """
    become_on_home("nightschool_learner", target, arguments)


@click.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def train(target: Target, *, arguments: Sequence[str]) -> None:
    """Train the cycles of a server on another host.

    Example: nightschool train --address serving.example:50051 --model /models/base
    """
    _become("learner", "nightschool_learner.remote", target, arguments)


@click.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def evaluate(target: Target, *, arguments: Sequence[str]) -> None:
    """Run the served agent on a published benchmark, GTA or GAIA, and score it.

    Example: nightschool evaluate gta --data gta_dataset
    """
    become_learner("nightschool_learner.benchmarks", target, arguments)


@click.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def token(target: Target, *, arguments: Sequence[str]) -> None:
    """Make, list and revoke tokens, on the server's machine.

    Example: nightschool token create app --scope user
    """
    _become("server", "nightschool_server", target, ["token", *arguments])


def become_on_home(module: str, target: Target, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a module of the learner that works on the home folder of `target`."""
    named = any(argument == "--home" or argument.startswith("--home=") for argument in arguments)
    home = [] if named else ["--home", str(home_folder(target.home))]
    _become("learner", module, target, [*home, *arguments])


def become_learner(module: str, target: Target, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a module of the learner that calls the server of `target`."""
    no_tls = ["--no-tls"] if target.tls is False else []
    _become("learner", module, target, [*arguments, *no_tls])


def _become(extra: str, package: str, target: Target, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m package arguments`."""
    if missing := missing_modules(NEEDED[extra]):
        context = click.get_current_context()
        if "--help" in arguments:
            click.echo(f"Usage: {context.command_path} [OPTIONS]\n\n{context.command.help}\n")
        raise click.UsageError(f"{missing[0]} is not installed: pip install 'nightschool[{extra}]'")
    sys.stdout.flush()
    command = [sys.executable, "-m", package, *arguments]
    os.execve(sys.executable, command, environment_of(target.home, target.address, target.token))


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those that cannot be imported; none of them is imported to find out."""
    return [name for name in names if importlib.util.find_spec(name) is None]
