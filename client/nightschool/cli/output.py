"""How results are written: JSON, a rich table on a terminal, plain aligned columns for everything else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import click

from nightschool.convert import to_json
from nightschool.records import Evaluation

F = TypeVar("F", bound=Callable[..., Any])

json_option: Callable[[F], F] = click.option("--json", "as_json", is_flag=True, help="Write JSON with stable keys.")


def write_json(value: Any) -> None:
    """One JSON document, indented."""
    click.echo(json.dumps(to_json(value), ensure_ascii=False, indent=2))


def write_json_line(value: Any) -> None:
    """One JSON object on one line, at once."""
    click.echo(json.dumps(to_json(value), ensure_ascii=False))
    sys.stdout.flush()


def write_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str = "none") -> None:
    """Rows under their columns; `empty` goes to stderr where there are none."""
    filled = [[cell.replace("\n", " ") for cell in row] for row in rows]
    if not filled:
        note(empty)
    elif sys.stdout.isatty():
        _write_rich(columns, filled)
    else:
        for line in aligned([list(columns), *filled]):
            click.echo(line)


def write_fields(fields: Iterable[tuple[str, str]]) -> None:
    """One `name  value` a line; fields without a value are left out."""
    for line in aligned([[name, value] for name, value in fields if value]):
        click.echo(line)


def note(text: str) -> None:
    """A line for the person who watches, on stderr."""
    click.echo(text, err=True)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, every column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def when(at: datetime | None) -> str:
    """A moment in local time."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at is not None else ""


def duration(seconds: float) -> str:
    """`7s`, `2m05s`, `3h07m`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if whole < 60:
        return f"{whole}s"
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def size(num_bytes: int) -> str:
    """`4.0 KiB`, `12.3 MiB`."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    kib = num_bytes / 1024
    return f"{kib:.1f} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"


def verdict(evaluation: Evaluation | None) -> str:
    """`62.5% -> 94.0% (n 400, p 1e-09)`, empty where there is none."""
    if evaluation is None:
        return ""
    before, after = evaluation.incumbent_success, evaluation.candidate_success
    return f"{before:.1%} -> {after:.1%} (n {evaluation.n}, p {evaluation.p_value:.2g})"


def _write_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, not markup: a prompt may hold square brackets.
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
