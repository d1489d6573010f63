"""`nightschool critic`: what the critic is worth."""

from __future__ import annotations

from collections.abc import Sequence

import click

from nightschool.cli.processes import PASS_THROUGH, become_on_home
from nightschool.cli.root import Target


@click.group(epilog="Example: nightschool critic audit")
def critic() -> None:
    """Measure the critic."""


@critic.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def audit(target: Target, *, arguments: Sequence[str]) -> None:
    """Compare the critic with pairs that people, or a rule, decided.

    Example: nightschool critic audit --json
    """
    become_on_home("nightschool_learner.audit_command", target, arguments)
