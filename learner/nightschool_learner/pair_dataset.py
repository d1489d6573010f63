"""`nightschool pairs export DIR`: the pairs of a server as a folder that `datasets` and TRL read as it is.

    data/train.parquet   TRL's conversational preference format, a column of pictures where there are any
    README.md            the data card; its head tells `datasets` where the rows are

    dataset = datasets.load_dataset("DIR", split="train")
    trl.DPOTrainer(model, train_dataset=dataset, ...)

The rows come over the AdminService, pictures by their sha256. Messages and tools are JSON columns, because the
arguments of two tools have no columns in common. Owns the folder; a row's form is the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nightschool
from nightschool import AsyncClient
from nightschool.errors import CALLER_MISTAKES

from nightschool_learner.data_card import Card, card_of
from nightschool_learner.errors import LearnerError, NothingToLearnError

ROWS_FILE = "data/train.parquet"
FAULT = 1
USER_MISTAKE = 2

EXAMPLE = "example:\n  nightschool pairs export shop_pairs\n"


@dataclass(frozen=True)
class Export:
    """Rows, and the folder that their pictures are in by sha256."""

    rows: Sequence[Mapping[str, Any]]
    pictures: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Export. Exit codes: 0 done, 1 a fault of the server, 2 the user's mistake."""
    options = _parser().parse_args(arguments)
    folder = options.folder.expanduser().absolute()
    try:
        if folder.exists():
            return _fail(f"{folder} is there already: name a new folder", USER_MISTAKE)
        num_rows = asyncio.run(_export(options, folder))
    except nightschool.NightschoolError as error:
        return _fail(error.message, USER_MISTAKE if error.code in CALLER_MISTAKES else FAULT)
    except (LearnerError, OSError) as error:
        return _fail(str(error), USER_MISTAKE)
    print(f"{num_rows} pairs in {folder}")  # noqa: T201
    return 0


async def _export(options: argparse.Namespace, folder: Path) -> int:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        async with AsyncClient(options.address, tls=options.tls) as client:
            status = await client.admin.status()
            export = await _fetch(client, options.cycle, Path(scratch))
        trainable = [row for row in export.rows if not has_tool_pictures(row)]
        if not trainable:
            where = f"cycle {options.cycle}" if options.cycle else "this server"
            raise NothingToLearnError(f"{where} has no pairs to export: see `nightschool pairs list`")
        made = Path(scratch) / "made"
        await asyncio.to_thread(write_dataset, Export(trainable, export.pictures), made)
        card = card_of(trainable, status, made / ROWS_FILE, num_left_out=len(export.rows) - len(trainable))
        write_card(made, card)
        made.rename(folder)
    return len(trainable)


async def _fetch(client: AsyncClient, cycle_id: str, scratch: Path) -> Export:
    lines = b"".join([chunk async for chunk in client.admin.export_pairs(cycle_id=cycle_id)]).splitlines()
    rows = [json.loads(line) for line in lines]
    pictures = scratch / "pictures"
    pictures.mkdir()
    for sha256 in sorted({sha256 for row in rows for sha256 in row["images"]}):
        await client.download(sha256, to=pictures / sha256)
    return Export(rows, pictures)


def has_tool_pictures(row: Mapping[str, Any]) -> bool:
    """Whether a tool gave back a picture; TRL 1.16 counts no places for pictures in a tool's message."""
    contents = [message["content"] for message in row["prompt"] if message["role"] == "tool"]
    return any(isinstance(content, list) for content in contents)


def write_dataset(export: Export, folder: Path) -> None:
    """The rows as a parquet file below `folder`, with a column of pictures where one of them has any."""
    from datasets import Dataset, Features, Image, Json, List, Value

    answer = List({"role": Value("string"), "content": Value("string")})
    columns = {
        "prompt": List(Json()), "chosen": answer, "rejected": answer, "tools": Json(),
        "pair_id": Value("string"), "kind": Value("string"), "margin": Value("float64"), "simulated": Value("bool"),
        "chosen_token_ids": List(Value("int32")), "rejected_token_ids": List(Value("int32")),
        "cycle_id": Value("string"), "task_id": Value("string"), "step": Value("int32"),
        "sampled_by": Value("string"), "trained": Value("string"),
    }  # fmt: skip
    rows = [{name: row[name] for name in columns} for row in export.rows]
    if any(row["images"] for row in export.rows):
        columns["images"] = List(Image())
        for row, source in zip(rows, export.rows, strict=True):
            row["images"] = [{"bytes": (export.pictures / s).read_bytes(), "path": None} for s in source["images"]]
    (folder / ROWS_FILE).parent.mkdir(parents=True)
    Dataset.from_list(rows, features=Features(columns)).to_parquet(folder / ROWS_FILE)


def write_card(folder: Path, card: Card) -> None:
    """README.md, whose head names the rows' file."""
    (folder / "README.md").write_text(card.text(ROWS_FILE), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nightschool pairs export",
        description="Write the pairs as a data set that TRL reads as it is, with a data card.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--cycle", default="", metavar="ID", help="only those of one cycle")
    parser.add_argument("--address", help="host:port of the server (default: as for every command)")
    parser.add_argument("--no-tls", action="store_false", dest="tls", default=None, help="speak to it without TLS")
    return parser


def _fail(message: str, code: int) -> int:
    print(f"nightschool pairs export: {message}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    raise SystemExit(main())
