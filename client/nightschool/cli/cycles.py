"""`nightschool cycles`: learning cycles, their progress and their outcome."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from nightschool.cli.evaluations import write_evaluation
from nightschool.cli.output import json_option, verdict, when, write_fields, write_json, write_json_line, write_table
from nightschool.cli.practice import practice_fields, write_families
from nightschool.cli.root import SERVER_FAULT, Target
from nightschool.cli.watch import progress_of, watch_bars, watch_lines
from nightschool.client import Client
from nightschool.errors import NotFoundError
from nightschool.records import Cycle, CycleState

json_lines_option = click.option("--json", "as_json", is_flag=True, help="Write one JSON object a change.")


@click.group(epilog="Example: nightschool cycles trigger --watch")
def cycles() -> None:
    """Look at learning cycles, begin one, follow one."""


@cycles.command("list", epilog="Example: nightschool cycles list --json")
@json_option
@click.pass_obj
def list_cycles(target: Target, *, as_json: bool) -> None:
    """List every cycle, newest first."""
    with target.client() as client:
        found = list(client.admin.cycles.list())
    if as_json:
        write_json(found)
        return
    rows = [
        [
            one.id,
            str(one.state),
            one.trigger,
            one.incumbent,
            one.candidate,
            verdict(one.evaluation),
            when(one.created_at),
        ]
        for one in found
    ]
    columns = ["id", "state", "trigger", "incumbent", "candidate", "held-out success", "created"]
    write_table(columns, rows, empty="no cycle yet: `nightschool cycles trigger` begins one")


@cycles.command(epilog="Example: nightschool cycles show")
@click.argument("cycle_id", required=False)
@json_option
@click.pass_obj
def show(target: Target, *, cycle_id: str | None, as_json: bool) -> None:
    """Show one cycle, its stages and its evaluation. Default: the latest."""
    with target.client() as client:
        found = client.admin.cycles.get(cycle_id or latest(client))
    if as_json:
        write_json(found)
    else:
        write_cycle(found)


@cycles.command(epilog="Example: nightschool cycles trigger --set train.epochs=2 --watch")
@click.option("--reason", default="", help="Why; kept on the record.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting for this cycle; may be repeated."
)
@click.option("--watch", "is_watched", is_flag=True, help="Follow it to its end.")
@json_option
@click.pass_obj
def trigger(target: Target, *, reason: str, overrides: Sequence[str], is_watched: bool, as_json: bool) -> None:
    """Practise now."""
    for override in overrides:
        if "=" not in override:
            raise click.UsageError(f"--set {override!r} is not KEY=VALUE")
    with target.client() as client:
        started = client.admin.cycles.trigger(reason=reason, overrides=overrides)
        if is_watched:
            _watch(client, started.id, as_json=as_json)
        elif as_json:
            write_json(started)
        else:
            click.echo(f"{started.id} {started.state}")


@cycles.command(
    epilog="Example: nightschool cycles watch\n\n"
    "Exit code: 0 when the cycle ended by itself (promoted, rejected, stopped) or was cancelled, 1 when it failed."
)
@click.argument("cycle_id", required=False)
@json_lines_option
@click.pass_obj
def watch(target: Target, *, cycle_id: str | None, as_json: bool) -> None:
    """Follow a cycle to its end. Default: the latest."""
    with target.client() as client:
        _watch(client, cycle_id or latest(client), as_json=as_json)


@cycles.command(epilog="Example: nightschool cycles report cyc_01h455vb4pex --open")
@click.argument("cycle_id", required=False)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Default: ID.html here.")
@click.option("--open", "is_opened", is_flag=True, help="Show it in the browser.")
@json_option
@click.pass_obj
def report(target: Target, *, cycle_id: str | None, out: Path | None, is_opened: bool, as_json: bool) -> None:
    """Write what a cycle did, and why it ended so, as one page. Default: the latest.

    The page needs no network and holds no script. With --json the same goes to stdout, or to FILE.
    """
    if as_json and is_opened:
        raise click.UsageError("--json and --open are both given: a browser shows the page")
    with target.client() as client:
        found = cycle_id or latest(client)
        whole = client.admin.cycles.report(found, format="json" if as_json else "html")
    if as_json and out is None:
        click.echo(whole.decode(), nl=False)
        return
    path = out or Path(f"{Path(found).name}.html")
    path.write_bytes(whole)
    click.echo(path)
    if is_opened:
        click.launch(path.absolute().as_uri())


@cycles.command(epilog="Example: nightschool cycles cancel cyc_01h455vb4pex --reason 'wrong data'")
@click.argument("cycle_id")
@click.option("--reason", default="", help="Why; kept on the record.")
@json_option
@click.pass_obj
def cancel(target: Target, *, cycle_id: str, reason: str, as_json: bool) -> None:
    """End a cycle early; nothing of it is promoted."""
    with target.client() as client:
        found = client.admin.cycles.cancel(cycle_id, reason=reason)
    if as_json:
        write_json(found)
    else:
        click.echo(f"{found.id} {found.state}")


def latest(client: Client) -> str:
    """The id of the newest cycle. Raises NotFoundError where there is none."""
    newest = next(iter(client.admin.cycles.list(page_size=1)), None)
    if newest is None:
        raise NotFoundError("there is no cycle yet: `nightschool cycles trigger` begins one")
    return newest.id


def write_cycle(cycle: Cycle) -> None:
    """A cycle for a person."""
    write_fields(
        [
            ("id", cycle.id),
            ("state", f"{cycle.state}{f', {cycle.num_resumes} resumes' if cycle.num_resumes else ''}"),
            ("trigger", f"{cycle.trigger}{f': {cycle.reason}' if cycle.reason else ''}"),
            ("created", when(cycle.created_at)),
            ("ended", when(cycle.ended_at)),
            ("incumbent", cycle.incumbent),
            ("candidate", cycle.candidate),
            ("held-out success", verdict(cycle.evaluation)),
            ("outcome", cycle.outcome),
            *practice_fields(cycle),
        ]
    )
    rows = [[stage.name, str(stage.state), progress_of(stage), stage.message] for stage in cycle.stages]
    write_table(["stage", "state", "progress", ""], rows, empty="no stage has begun")
    write_families(cycle)
    if cycle.evaluation is not None:
        write_evaluation(cycle.evaluation)


def _watch(client: Client, cycle_id: str, *, as_json: bool) -> None:
    changes = client.admin.cycles.watch(cycle_id)
    last: Cycle | None = None
    if as_json:
        for last in changes:
            write_json_line(last)
    else:
        last = watch_bars(changes) if sys.stderr.isatty() else watch_lines(changes)
    if last is None:
        raise click.ClickException(f"the server said nothing of cycle {cycle_id}: see its log")
    if not as_json:
        shown = verdict(last.evaluation)
        click.echo(f"{last.id} {last.state}{f': {last.outcome}' if last.outcome else ''}{f' {shown}' if shown else ''}")
    if last.state is CycleState.FAILED:
        click.get_current_context().exit(SERVER_FAULT)
