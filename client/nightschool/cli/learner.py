"""`nightschool learner`: begin cycles, or do not."""

from __future__ import annotations

import click

from nightschool.cli.output import json_option, write_json
from nightschool.cli.root import Target
from nightschool.records import LearnerStatus


@click.group(epilog="Example: nightschool learner pause --reason 'stocktaking'")
def learner() -> None:
    """Pause and resume learning."""


@learner.command(epilog="Example: nightschool learner pause --reason 'stocktaking'")
@click.option("--reason", default="", help="Why; kept on the record.")
@json_option
@click.pass_obj
def pause(target: Target, *, reason: str, as_json: bool) -> None:
    """Begin no cycle until `resume`."""
    with target.client() as client:
        _write(client.admin.learner.pause(reason=reason), as_json=as_json)


@learner.command(epilog="Example: nightschool learner resume")
@json_option
@click.pass_obj
def resume(target: Target, *, as_json: bool) -> None:
    """Begin cycles again."""
    with target.client() as client:
        _write(client.admin.learner.resume(), as_json=as_json)


def _write(found: LearnerStatus, *, as_json: bool) -> None:
    if as_json:
        write_json(found)
        return
    state = "paused" if found.paused else "running" if found.running else "not running"
    click.echo(f"the learner is {state}")
