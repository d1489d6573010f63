"""`nightschool adapters`: the registry and the active pointer."""

from __future__ import annotations

import click

from nightschool.cli.evaluations import write_evaluation
from nightschool.cli.output import json_option, size, verdict, when, write_fields, write_json, write_table
from nightschool.cli.root import Target
from nightschool.records import Adapter, AdapterState, RouteChange

STATES = [state.value for state in AdapterState if state is not AdapterState.UNSPECIFIED]
reason_option = click.option("--reason", default="", help="Why; kept on the record.")


@click.group(epilog="Example: nightschool adapters list")
def adapters() -> None:
    """Look at adapters and choose the active one."""


@adapters.command("list", epilog="Example: nightschool adapters list --state candidate --json")
@click.option("--state", type=click.Choice(STATES), help="Only those in one state.")
@json_option
@click.pass_obj
def list_adapters(target: Target, *, state: str | None, as_json: bool) -> None:
    """List every adapter, its state and its evaluation."""
    with target.client() as client:
        found = list(client.admin.adapters.list(state=state))
    if as_json:
        write_json(found)
        return
    rows = [
        [one.name, str(one.state), one.parent, verdict(one.evaluation), size(one.size_bytes), when(one.created_at)]
        for one in found
    ]
    write_table(["name", "state", "parent", "held-out success", "size", "created"], rows, empty="no adapters yet")


@adapters.command(epilog="Example: nightschool adapters show 4-00ff00ff")
@click.argument("name")
@json_option
@click.pass_obj
def show(target: Target, *, name: str, as_json: bool) -> None:
    """Show one adapter, its evaluation and its audit trail."""
    with target.client() as client:
        found = client.admin.adapters.get(name)
    _write_adapter(found, as_json=as_json)


@adapters.command(epilog="Example: nightschool adapters promote 4-00ff00ff --reason 'checked by hand'")
@click.argument("name")
@reason_option
@click.option("--force", is_flag=True, help="Skip the gate, on the record.")
@json_option
@click.pass_obj
def promote(target: Target, *, name: str, reason: str, force: bool, as_json: bool) -> None:
    """Make an adapter the active one."""
    with target.client() as client:
        change = client.admin.adapters.promote(name, reason=reason, force=force)
    _write_change(change, as_json=as_json)


@adapters.command(epilog="Example: nightschool adapters rollback --to base --reason 'worse on returns'")
@click.option("--to", default="", metavar="NAME", help='The adapter to go back to, "base" for none. Default: the last.')
@reason_option
@json_option
@click.pass_obj
def rollback(target: Target, *, to: str, reason: str, as_json: bool) -> None:
    """Go back to the adapter that was active before."""
    with target.client() as client:
        change = client.admin.adapters.rollback(to, reason=reason)
    _write_change(change, as_json=as_json)


@adapters.command(
    "import", epilog="Example: nightschool adapters import /srv/adapters/mine --reason 'trained elsewhere'"
)
@click.argument("path")
@click.option("--parent", default="", metavar="NAME", help="The adapter that it was trained from.")
@reason_option
@json_option
@click.pass_obj
def import_adapter(target: Target, *, path: str, parent: str, reason: str, as_json: bool) -> None:
    """Take a PEFT adapter folder on the server's machine in as a candidate."""
    with target.client() as client:
        found = client.admin.adapters.import_(path, parent=parent, reason=reason)
    _write_adapter(found, as_json=as_json)


@adapters.command(epilog="Example: nightschool adapters delete 1-11111111 --yes")
@click.argument("name")
@click.confirmation_option(prompt="Delete the adapter's files for good?")
@click.pass_obj
def delete(target: Target, *, name: str) -> None:
    """Remove an adapter that is neither active nor in use."""
    with target.client() as client:
        client.admin.adapters.delete(name)
    click.echo(f"deleted {name}")


def _write_change(change: RouteChange, *, as_json: bool) -> None:
    if as_json:
        write_json(change)
    else:
        active, previous = change.active_adapter, change.previous_adapter
        click.echo(f"{active} answers, after {change.duration_s:.2f} s; a rollback goes to {previous}")


def _write_adapter(found: Adapter, *, as_json: bool) -> None:
    if as_json:
        write_json(found)
        return
    write_fields(
        [
            ("name", found.name),
            ("state", f"{found.state}{', loaded' if found.loaded else ''}, {found.num_leases} leases"),
            ("parent", found.parent),
            ("cycle", found.cycle_id),
            ("digest", found.digest),
            ("lora", f"rank {found.rank}, alpha {found.alpha:g}, {' '.join(found.target_modules)}"),
            ("size", size(found.size_bytes)),
            ("created", when(found.created_at)),
            ("held-out success", verdict(found.evaluation)),
        ]
    )
    if found.evaluation is not None:
        write_evaluation(found.evaluation)
    for event in found.events:
        click.echo(f"{when(event.at)}  {event.action} by {event.actor}: {event.reason}")
