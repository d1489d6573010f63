"""One preference pair as a person reads it: two columns on a terminal, one after the other for everything else."""

from __future__ import annotations

import sys

import click

from nightschool.cli.output import when, write_fields
from nightschool.content import Message, Part, Text, ToolCall, ToolResult
from nightschool.pair_records import PairDetail, PairSide


def write_pair(detail: PairDetail) -> None:
    """Prompt, both sides, critique, kind and margin, lineage."""
    write_fields(_facts(detail))
    for message in detail.messages:
        click.echo(f"\n[{message.role}]\n{_text(message)}")
    click.echo()
    if sys.stdout.isatty():
        _write_columns(detail)
    else:
        for title, side in _sides(detail):
            click.echo(f"[{title}]\n{_side_text(side)}\n")
    for line in _critique(detail):
        click.echo(line)


def _facts(detail: PairDetail) -> list[tuple[str, str]]:
    pair = detail.pair
    assert pair is not None, "the server sends the pair"
    return [
        ("pair", pair.id),
        ("kind", pair.kind + (", simulated" if pair.simulated else "")),
        ("decided by", detail.decided_by),
        ("margin", f"{pair.margin:.2f}" if pair.kind == "both_ran" else ""),
        ("cycle", pair.cycle_id),
        ("task", f"{pair.task_id}, step {pair.step}: {' '.join(detail.task_prompt.split())}"),
        ("seeds", ", ".join(detail.seed_request_ids)),
        ("sampled by", detail.sampled_by),
        ("trained", detail.trained),
        ("created", when(detail.created_at)),
    ]


def _critique(detail: PairDetail) -> list[str]:
    if not detail.verdicts:
        return ["[critique]", "no judge was asked"]
    lines = ["[critique]"]
    for verdict in detail.verdicts:
        order = "chosen first" if verdict.chosen_first else "rejected first"
        words = " ".join(verdict.raw.split())
        lines.append(f"{order}: {verdict.verdict}, {verdict.margin:+.2f} nats for the chosen; {words!r}")
    return lines


def _sides(detail: PairDetail) -> list[tuple[str, PairSide]]:
    assert detail.chosen is not None, "the server sends both sides"
    assert detail.rejected is not None, "the server sends both sides"
    return [("chosen", detail.chosen), ("rejected", detail.rejected)]


def _side_text(side: PairSide) -> str:
    facts = f"{side.num_samples} samples, {len(side.token_ids)} tokens, logprob {side.logprob:.2f}"
    failed = f"\nfailed: {side.failure}" if side.failure else ""
    observed = f"\n-> {side.observation}" if side.observation else ""
    return f"{side.text}{observed}{failed}\n({facts})"


def _text(message: Message) -> str:
    return "\n".join(_part_text(part) for part in message.parts)


def _part_text(part: Part) -> str:
    match part:
        case Text(text):
            return text
        case ToolCall():
            return f"-> {part.name} {part.arguments_json}"
        case ToolResult():
            return f"<- {part.name}: {part.content}"
        case _:
            return f"[{type(part).__name__.lower()} {part.sha256[:12]}]"


def _write_columns(detail: PairDetail) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as RichText

    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    sides = _sides(detail)
    for title, _ in sides:
        table.add_column(title, ratio=1, overflow="fold")
    # Text, not markup: what a model wrote may hold square brackets.
    table.add_row(*(RichText(_side_text(side)) for _, side in sides))
    Console().print(table)
