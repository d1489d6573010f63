"""The table as a file: a row that is there is not run again, so that it can be filled piece by piece.

One JSON object: `cycles` (a list, one entry a night), `ablations` and `recipes` (by the row's name), and `quick`, since
rows of quick and of whole runs do not belong into one table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.nights.measures import Night
from bench.nights.rows import Row


class MixedTableError(ValueError):
    """The file holds rows of the other kind of run."""


class Table:
    """The rows that were run, in `rows` as JSON has them."""

    def __init__(self, path: Path | None, *, quick: bool) -> None:
        """Read `path` where it exists; None keeps the table in memory alone. Raises MixedTableError."""
        self._path = path
        self.rows: dict[str, Any] = {"quick": quick, "cycles": [], "ablations": {}, "recipes": {}}
        if path is not None and path.exists():
            self.rows |= json.loads(path.read_text())
        if self.rows["quick"] != quick:
            kind = "a quick run" if self.rows["quick"] else "whole runs"
            raise MixedTableError(f"{path} holds rows of {kind}: give --out another file")

    def __contains__(self, row: Row) -> bool:
        return bool(self.rows["cycles"]) if row.group == "cycles" else row.name in self.rows[row.group]

    def add(self, row: Row, nights: Sequence[Night]) -> None:
        """Take a row in, and write the file anew."""
        found = [asdict(night) for night in nights]
        if row.group == "cycles":
            self.rows["cycles"] = found
        else:
            self.rows[row.group][row.name] = {"what": row.what, "overrides": row.overrides, "nights": found}
        if self._path is not None:
            partial = self._path.with_name(f".{self._path.name}")
            partial.write_text(json.dumps(self.rows, indent=1) + "\n")
            partial.replace(self._path)

    def last_line(self) -> str:
        """The whole table as one line of JSON."""
        return json.dumps({key: self.rows[key] for key in ("cycles", "ablations", "recipes")})
