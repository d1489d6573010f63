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


@dataclass(frozen=True)
class Card:
    """What the card says."""

    num_pairs: int
    num_left_out: int
    """Pairs with pictures that a tool gave back."""
    num_with_pictures: int
    num_simulated: int
    kinds: Mapping[str, int]
    cycles: Mapping[str, int]
    sampled_by: Mapping[str, int]
    trained: Mapping[str, int]
    mean_tokens: tuple[float, float]
    """Of chosen and rejected answers."""
    base_model: str
    base_model_digest: str
    chat_template_digest: str
    redacts: bool
    rows_sha256: str

    def text(self, rows_file: str) -> str:
        """Markdown; the head between `---` is what `datasets` reads."""
        head = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {rows_file}\n---\n"
        chosen, rejected = self.mean_tokens
        facts = [
            ("pairs", f"{self.num_pairs}"),
            *((f"of kind `{kind}`", f"{count}") for kind, count in sorted(self.kinds.items())),
            ("with pictures in the prompt", f"{self.num_with_pictures}"),
            ("that rest on a simulated observation", f"{self.num_simulated}"),
            ("left out: a tool gave back a picture, which TRL does not place", f"{self.num_left_out}"),
            ("tokens of an answer in the mean, chosen and rejected", f"{chosen:.1f}, {rejected:.1f}"),
            ("base model", f"`{self.base_model}`, sha256 `{self.base_model_digest}`"),
            ("chat template", f"sha256 `{self.chat_template_digest}`"),
            (f"`{rows_file}`", f"sha256 `{self.rows_sha256}`"),
            ("exported by", f"nightschool {version('nightschool')}"),
        ]
        table = "".join(f"| {name} | {value} |\n" for name, value in facts)
        lineage = _table("cycle", self.cycles) + _table("adapter that sampled", self.sampled_by)
        return (
            f"{head}\n# Preference pairs of a nightschool\n\n{_ABOUT}\n| | |\n|---|---|\n{table}\n"
            f"## Lineage\n\n{lineage}{_table('adapter that was trained on them', self.trained)}\n"
            f"## Redaction\n\n{_REDACTED if self.redacts else _PLAIN}\n\n## Licence\n\n{_LICENCE}\n"
        )


def card_of(rows: Sequence[Mapping[str, Any]], status: Status, rows_file: Path, *, num_left_out: int) -> Card:
    """The card of `rows`, which `rows_file` holds."""
    return Card(
        num_pairs=len(rows),
        num_left_out=num_left_out,
        num_with_pictures=sum(bool(row["images"]) for row in rows),
        num_simulated=sum(row["simulated"] for row in rows),
        kinds=Counter(row["kind"] for row in rows),
        cycles=Counter(row["cycle_id"] for row in rows),
        sampled_by=Counter(row["sampled_by"] for row in rows),
        trained=Counter(row["trained"] or "none" for row in rows),
        mean_tokens=(
            mean(len(row["chosen_token_ids"]) for row in rows),
            mean(len(row["rejected_token_ids"]) for row in rows),
        ),
        base_model=Path(status.base_model).name,
        base_model_digest=status.base_model_digest,
        chat_template_digest=status.chat_template_digest,
        redacts=status.log is not None and status.log.redacts,
        rows_sha256=hashlib.sha256(rows_file.read_bytes()).hexdigest(),
    )


def _table(name: str, counts: Mapping[str, int]) -> str:
    rows = "".join(f"| {key} | {count} |\n" for key, count in sorted(counts.items()))
    return f"| {name} | pairs |\n|---|---|\n{rows}\n"


_ABOUT = """Two actions that one model tried at the same step of a task, and which was better, in TRL's conversational
preference format. `both_ran`: a critic preferred the chosen one in both orders by `margin` nats. `ran_vs_failed`: the
rejected one failed by a fact. The content of `chosen` and `rejected` is what was sampled, verbatim, and
`chosen_token_ids` and `rejected_token_ids` are the sampled tokens, the end of the turn included.

```python
from datasets import load_dataset

dataset = load_dataset("DIR", split="train")  # as it is for trl.DPOTrainer(train_dataset=...)
```
"""

_REDACTED = """Tasks were written by the model from logged requests. Logged text was redacted before it was stored
(e-mail addresses, card numbers, credentials: patterns, not understanding); pictures and names were not. Read the rows
before you pass them on."""

_PLAIN = """Tasks were written by the model from logged requests, whose text was **not** redacted
(`log.redact = false`). Read the rows before you pass them on."""

_LICENCE = """None is given here: it is for the operator of the server to decide, with the terms of the base model and
the consent of those whose requests the tasks were written from in mind."""
