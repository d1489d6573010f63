"""`nightschool pairs export DIR`: the training rows of a server as a folder that `datasets` and TRL read as it is.

    data/preferences.parquet   the pairs, in TRL's conversational preference format, for DPO
    data/corrections.parquet   what callers say an answer should have been, prompt and completion, for SFT
    data/thumbs.parquet        thumbs up and down: prompt, completion and label, for KTO
    README.md                  the data card; its head tells `datasets` where the rows are

    dataset = datasets.load_dataset("DIR", "preferences", split="train")
    trl.DPOTrainer(model, train_dataset=dataset, ...)

A kind without rows has no file; one with pictures has a column of them. The rows come over the AdminService, pictures
by their sha256. Messages and tools are JSON columns, because the arguments of two tools have no columns in common. Owns
the folder; a row's form is the server's and the learner's `feedback_rows.py`'s.
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
from nightschool_server.uninterrupted import uninterrupted

from nightschool_learner.data_card import card_of
from nightschool_learner.errors import LearnerError, NothingToLearnError

KINDS = ("preferences", "corrections", "thumbs")
"""Of rows; the first one that has any is what `load_dataset` gives without a name."""
Rows = list[dict[str, Any]]

FAULT = 1
USER_MISTAKE = 2

EXAMPLE = "example:\n  nightschool pairs export shop_pairs\n"


@dataclass(frozen=True)
class Export:
    """Rows by kind, and the folder that their pictures are in by sha256."""

    rows: Mapping[str, Rows]
    pictures: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Export. Exit codes: 0 done, 1 a fault of the server, 2 the user's mistake."""
    options = _parser().parse_args(arguments)
    folder = options.folder.expanduser().absolute()
    try:
        if folder.exists():
            return _fail(f"{folder} is there already: name a new folder", USER_MISTAKE)
        counts = asyncio.run(_export(options, folder))
    except nightschool.NightschoolError as error:
        return _fail(error.message, USER_MISTAKE if error.code in CALLER_MISTAKES else FAULT)
    except (LearnerError, OSError) as error:
        return _fail(str(error), USER_MISTAKE)
    print(f"{', '.join(f'{n} {kind}' for kind, n in counts.items())} in {folder}")  # noqa: T201
    return 0


async def _export(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Write the folder. Returns how many rows of each kind it has."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        async with AsyncClient(options.address, tls=options.tls) as client:
            status = await client.admin.status()
            export = await _fetch(client, options.cycle, Path(scratch))
        placed = {kind: [row for row in rows if not has_tool_pictures(row)] for kind, rows in export.rows.items()}
        left_out = sum(len(rows) - len(placed[kind]) for kind, rows in export.rows.items())
        kept = {kind: rows for kind, rows in placed.items() if rows}
        if not kept:
            where = f"cycle {options.cycle}" if options.cycle else "this server"
            raise NothingToLearnError(f"{where} has no pairs to export: see `nightschool pairs list`")
        made = Path(scratch) / "made"
        await uninterrupted(asyncio.to_thread(write_dataset, Export(kept, export.pictures), made))
        card = card_of(kept, status, {kind: made / rows_file(kind) for kind in kept}, num_left_out=left_out)
        (made / "README.md").write_text(card.text(), encoding="utf-8")
        made.rename(folder)
    return {kind: len(rows) for kind, rows in kept.items()}


async def _fetch(client: AsyncClient, cycle_id: str, scratch: Path) -> Export:
    rows: dict[str, Rows] = {}
    for kind in KINDS:
        chunks = client.admin.export_pairs(cycle_id=cycle_id, rows=kind)
        rows[kind] = [json.loads(line) for line in b"".join([chunk async for chunk in chunks]).splitlines()]
    pictures = scratch / "pictures"
    pictures.mkdir()
    for sha256 in sorted({sha256 for each in rows.values() for row in each for sha256 in row["images"]}):
        await client.download(sha256, to=pictures / sha256)
    return Export(rows, pictures)


def rows_file(kind: str) -> str:
    """Where the rows of a kind lie, from the folder."""
    return f"data/{kind}.parquet"


def has_tool_pictures(row: Mapping[str, Any]) -> bool:
    """Whether a tool gave back a picture; TRL 1.16 counts no places for pictures in a tool's message."""
    contents = [message["content"] for message in row["prompt"] if message["role"] == "tool"]
    return any(isinstance(content, list) for content in contents)


def write_dataset(export: Export, folder: Path) -> None:
    """One parquet file a kind below `folder`, with a column of pictures where a row of it has any."""
    from datasets import Dataset, Features, Image, List

    (folder / "data").mkdir(parents=True)
    for kind, rows in export.rows.items():
        columns = _columns(kind)
        written = [{name: row[name] for name in columns} for row in rows]
        if any(row["images"] for row in rows):
            columns["images"] = List(Image())
            for row, source in zip(written, rows, strict=True):
                row["images"] = [{"bytes": (export.pictures / s).read_bytes(), "path": None} for s in source["images"]]
        Dataset.from_list(written, features=Features(columns)).to_parquet(folder / rows_file(kind))


def _columns(kind: str) -> dict[str, Any]:
    """The columns of a kind of rows but the pictures'."""
    from datasets import Json, List, Value

    said = List({"role": Value("string"), "content": Value("string")})
    told = {"prompt": List(Json()), "tools": Json()}
    if kind != "preferences":
        answered = {"completion": said, "response_id": Value("string"), "adapter": Value("string")}
        return {**told, **answered, **({"label": Value("bool")} if kind == "thumbs" else {})}
    return {
        **told, "chosen": said, "rejected": said,
        "pair_id": Value("string"), "kind": Value("string"), "margin": Value("float64"), "simulated": Value("bool"),
        "chosen_token_ids": List(Value("int32")), "rejected_token_ids": List(Value("int32")),
        "cycle_id": Value("string"), "task_id": Value("string"), "step": Value("int32"),
        "sampled_by": Value("string"), "trained": Value("string"),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nightschool pairs export",
        description="Write the pairs, and what callers said of answers, as a data set that TRL reads as it is.",
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
