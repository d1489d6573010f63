"""`pairs`: the preferences that the learner made, listed, shown side by side, exported for trainers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from nightschool.cli.data import cycle_option, preview
from nightschool.cli.output import json_option, note, write_json, write_table
from nightschool.cli.pair_view import write_pair
from nightschool.cli.processes import PASS_THROUGH, become_learner, become_on_home
from nightschool.cli.root import Target

ROWS = ("preferences", "corrections", "thumbs")


@click.group(invoke_without_command=True, epilog="Example: nightschool pairs show pair_01h455vb4pex")
@cycle_option
@json_option
@click.pass_context
def pairs(context: click.Context, *, cycle_id: str, as_json: bool) -> None:
    """List, show or export the preference pairs."""
    if context.invoked_subcommand is None:
        _list_pairs(context.obj, cycle_id, as_json=as_json)


@pairs.command("list", epilog="Example: nightschool pairs list --cycle cyc_01h455vb4pex")
@cycle_option
@json_option
@click.pass_obj
def list_pairs(target: Target, *, cycle_id: str, as_json: bool) -> None:
    """List the preference pairs."""
    _list_pairs(target, cycle_id, as_json=as_json)


@pairs.command(epilog="Example: nightschool pairs show pair_01h455vb4pex")
@click.argument("id")
@json_option
@click.pass_obj
def show(target: Target, *, id: str, as_json: bool) -> None:
    """Show one pair side by side, with its prompt, critique and lineage."""
    with target.client() as client:
        detail = client.admin.pair(id)
    if as_json:
        write_json(detail)
    else:
        write_pair(detail)


@pairs.command(epilog="Example: nightschool pairs export shop_pairs")
@click.argument("folder", required=False, type=click.Path(file_okay=False, path_type=Path), metavar="[DIR]")
@cycle_option
@click.option(
    "--rows", type=click.Choice(ROWS), default=ROWS[0], help="Of JSON lines: the pairs, or what callers said."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines into a file.")
@click.pass_obj
def export(target: Target, *, folder: Path | None, cycle_id: str, rows: str, output: Path | None) -> None:
    """Write the pairs for trainers: a data set into DIR, or JSON lines to stdout.

    DIR is a new folder that `datasets.load_dataset` and TRL's DPOTrainer read as it is, with pictures and a data card;
    it needs nightschool[learner].
    """
    if folder is not None:
        if output is not None:
            raise click.UsageError("DIR and --output are both given: DIR holds a data set, --output JSON lines")
        arguments = [str(folder), *(["--cycle", cycle_id] if cycle_id else [])]
        become_learner("nightschool_learner.pair_dataset", target, arguments)
    with target.client() as client:
        chunks = client.admin.export_pairs(cycle_id=cycle_id, rows=rows)
        if output is None:
            stdout = sys.stdout.buffer
            stdout.writelines(chunks)
            stdout.flush()
            return
        with output.open("wb") as file:
            num_bytes = sum(file.write(chunk) for chunk in chunks)
    note(f"{num_bytes} bytes in {output}")


@pairs.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def label(target: Target, *, arguments: Sequence[str]) -> None:
    """Say which of two candidates is better, on the server's machine; the critic is audited on it.

    Example: nightschool pairs label --num 30
    """
    become_on_home("nightschool_learner.label_command", target, arguments)


def _list_pairs(target: Target, cycle_id: str, *, as_json: bool) -> None:
    with target.client() as client:
        found = list(client.admin.pairs(cycle_id=cycle_id))
    if as_json:
        write_json(found)
        return
    rows = [
        [
            one.id, one.task_id, str(one.step), one.kind, f"{one.margin:.2f}", "yes" if one.simulated else "",
            preview(one.chosen), preview(one.rejected),
        ]
        for one in found
    ]  # fmt: skip
    write_table(["id", "task", "step", "kind", "margin", "simulated", "chosen", "rejected"], rows, empty="no pairs yet")
