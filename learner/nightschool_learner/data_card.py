"""The card of an exported data set: what is in it, where it comes from, what was done to it, and what is left open."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from nightschool import Status

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Pairs:
    """What the card says of preferences."""

    kinds: Mapping[str, int]
    cycles: Mapping[str, int]
    sampled_by: Mapping[str, int]
    trained: Mapping[str, int]
    num_simulated: int
    mean_tokens: tuple[float, float]
    """Of chosen and rejected answers; 0 where there are no pairs."""


@dataclass(frozen=True)
class Card:
    """What the card says."""

    num_rows: Mapping[str, int]
    """By kind of rows."""
    num_with_pictures: int
    num_left_out: int
    """Rows with pictures that a tool gave back."""
    pairs: Pairs
    base_model: str
    base_model_digest: str
    chat_template_digest: str
    redacts: bool
    sha256: Mapping[str, str]
    """Of the rows' files, by kind."""

    def text(self) -> str:
        """Markdown; the head between `---` is what `datasets` reads."""
        table = "".join(f"| {name} | {value} |\n" for name, value in self._facts())
        pairs = self.pairs
        lineage = _table("cycle", pairs.cycles) + _table("adapter that sampled", pairs.sampled_by)
        return (
            f"{self._head()}\n# Training rows of a nightschool\n\n{_ABOUT}\n| | |\n|---|---|\n{table}\n"
            f"## Lineage of the preferences\n\n{lineage}{_table('adapter that was trained on them', pairs.trained)}\n"
            f"## Redaction\n\n{_REDACTED if self.redacts else _PLAIN}\n\n## Licence\n\n{_LICENCE}\n"
        )

    def _head(self) -> str:
        lines = ["---", "configs:"]
        for number, kind in enumerate(self.num_rows):
            default = ["  default: true"] if number == 0 else []
            file = f"    path: data/{kind}.parquet"
            lines += [f"- config_name: {kind}", *default, "  data_files:", "  - split: train", file]
        return "\n".join([*lines, "---", ""])

    def _facts(self) -> list[tuple[str, str]]:
        chosen, rejected = self.pairs.mean_tokens
        return [
            *((kind, f"{count}") for kind, count in self.num_rows.items()),
            *((f"preferences of kind `{kind}`", f"{count}") for kind, count in sorted(self.pairs.kinds.items())),
            ("preferences that rest on a simulated observation", f"{self.pairs.num_simulated}"),
            ("tokens of an answer in the mean, chosen and rejected", f"{chosen:.1f}, {rejected:.1f}"),
            ("rows with pictures in the prompt", f"{self.num_with_pictures}"),
            ("left out: a tool gave back a picture, which TRL does not place", f"{self.num_left_out}"),
            ("base model", f"`{self.base_model}`, sha256 `{self.base_model_digest}`"),
            ("chat template", f"sha256 `{self.chat_template_digest}`"),
            *((f"`data/{kind}.parquet`", f"sha256 `{digest}`") for kind, digest in self.sha256.items()),
            ("exported by", f"nightschool {version('nightschool')}"),
        ]


def card_of(rows: Mapping[str, Rows], status: Status, files: Mapping[str, Path], *, num_left_out: int) -> Card:
    """The card of `rows` by kind, which `files` hold."""
    return Card(
        num_rows={kind: len(each) for kind, each in rows.items()},
        num_with_pictures=sum(bool(row["images"]) for each in rows.values() for row in each),
        num_left_out=num_left_out,
        pairs=_pairs_of(rows.get("preferences", ())),
        base_model=Path(status.base_model).name,
        base_model_digest=status.base_model_digest,
        chat_template_digest=status.chat_template_digest,
        redacts=status.log is not None and status.log.redacts,
        sha256={kind: hashlib.sha256(file.read_bytes()).hexdigest() for kind, file in files.items()},
    )


def _pairs_of(rows: Rows) -> Pairs:
    sides = ("chosen_token_ids", "rejected_token_ids")
    chosen, rejected = (mean([len(row[side]) for row in rows]) if rows else 0.0 for side in sides)
    return Pairs(
        kinds=Counter(row["kind"] for row in rows),
        cycles=Counter(row["cycle_id"] for row in rows),
        sampled_by=Counter(row["sampled_by"] for row in rows),
        trained=Counter(row["trained"] or "none" for row in rows),
        num_simulated=sum(row["simulated"] for row in rows),
        mean_tokens=(chosen, rejected),
    )


def _table(name: str, counts: Mapping[str, int]) -> str:
    rows = "".join(f"| {key} | {count} |\n" for key, count in sorted(counts.items()))
    return f"| {name} | pairs |\n|---|---|\n{rows}\n"


_ABOUT = """`preferences`: two actions that one model tried at the same step of a task, and which was better, for DPO.
`both_ran`: a critic preferred the chosen one in both orders by `margin` nats. `ran_vs_failed`: the rejected one
failed by a fact. The content of `chosen` and `rejected` is what was sampled, verbatim, and `chosen_token_ids` and
`rejected_token_ids` are the sampled tokens, the end of the turn included. `corrections`: what a caller says an answer
should have been, for SFT. `thumbs`: answers that a caller called good or bad, for KTO.

```python
from datasets import load_dataset

dataset = load_dataset("DIR", "preferences", split="train")  # as it is for trl.DPOTrainer(train_dataset=...)
```
"""

_REDACTED = """Tasks were written by the model from logged requests; corrections and thumbs are of logged requests
themselves. Logged text was redacted before it was stored (e-mail addresses, card numbers, credentials: patterns, not
understanding); pictures and names were not. Read the rows before you pass them on."""

_PLAIN = """Tasks were written by the model from logged requests; corrections and thumbs are of logged requests
themselves. Their text was **not** redacted (`log.redact = false`). Read the rows before you pass them on."""

_LICENCE = """None is given here: it is for the operator of the server to decide, with the terms of the base model and
the consent of those whose requests the tasks were written from in mind."""
