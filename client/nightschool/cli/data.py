"""`tasks` and `forget`: what the learner made of the logged requests, and their erasure."""

from __future__ import annotations

import click

from nightschool.cli.output import json_option, when, write_json, write_table
from nightschool.cli.root import Target
from nightschool.records import Task

cycle_option = click.option("--cycle", "cycle_id", default="", metavar="ID", help="Only those of one cycle.")
PREVIEW = 60


@click.group(invoke_without_command=True, epilog="Example: nightschool tasks --cycle cyc_01h455vb4pex --json")
@cycle_option
@json_option
@click.pass_context
def tasks(context: click.Context, *, cycle_id: str, as_json: bool) -> None:
    """List the tasks that the learner wrote."""
    if context.invoked_subcommand is None:
        _list_tasks(context.obj, cycle_id, as_json=as_json)


@tasks.command("list", epilog="Example: nightschool tasks list --cycle cyc_01h455vb4pex")
@cycle_option
@json_option
@click.pass_obj
def list_tasks(target: Target, *, cycle_id: str, as_json: bool) -> None:
    """List the tasks that the learner wrote."""
    _list_tasks(target, cycle_id, as_json=as_json)


def _list_tasks(target: Target, cycle_id: str, *, as_json: bool) -> None:
    with target.client() as client:
        found = list(client.admin.tasks(cycle_id=cycle_id))
    if as_json:
        write_json(found)
        return
    rows = [
        [
            one.id, one.cycle_id, one.state, "" if one.solve_rate is None else f"{one.solve_rate:.0%}",
            str(one.num_simulated or ""), preview(one.prompt), preview(verified(one)), when(one.created_at),
        ]
        for one in found
    ]  # fmt: skip
    names = ["id", "cycle", "state", "solved", "simulated", "prompt", "verifier", "created"]
    write_table(names, rows, empty="no tasks yet")


@click.command(epilog="Example: nightschool forget ann --yes")
@click.argument("user")
@click.confirmation_option(prompt="Erase every logged request of this user, and what was derived from it?")
@json_option
@click.pass_obj
def forget(target: Target, *, user: str, as_json: bool) -> None:
    """Erase what was logged for USER, the name of a token."""
    with target.client() as client:
        num_requests = client.admin.forget_user(user)
    if as_json:
        write_json({"user": user, "num_requests": num_requests})
    else:
        click.echo(f"{num_requests} requests erased")


def verified(task: Task) -> str:
    """What the verifier said of a task, and why; empty where none was asked."""
    said = task.verification
    if said is None:
        return ""
    return f"{said.verdict}: {said.reason}" if said.reason else said.verdict


def preview(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= PREVIEW else line[: PREVIEW - 3] + "..."
