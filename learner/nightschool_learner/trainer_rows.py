"""What a run trains on and what it only looks at: the rows of its files as tokens, fitted to the context, split.

Reads the files that the manifest names, encodes them (`trainer_data.py`), drops what is too long, and holds back the
share that `validation.py` chooses. Imports torch; used by the trainer process alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import Manifest
from nightschool_learner.trainer_data import (
    EncodedAnchor,
    EncodedPair,
    PairCollator,
    encode_anchor,
    encode_pair,
    read_rows,
)
from nightschool_learner.trainer_model import Student
from nightschool_learner.validation import split_rows


@dataclass(frozen=True)
class Material:
    """The encoded rows of a run."""

    collator: PairCollator
    """Holds all of them."""
    held_pairs: frozenset[int]
    """Indices of those that are only looked at."""
    held_anchors: frozenset[int]
    num_dropped: int
    """Pairs that were too long."""

    @property
    def pairs(self) -> Sequence[EncodedPair]:
        """All pairs, those that are held back among them."""
        return self.collator.pairs

    def dataset(self, *, held_back: bool) -> Any:
        """The rows to look at, or those to train on, as a `datasets.Dataset` of indices."""
        import datasets

        pairs = _chosen(range(len(self.collator.pairs)), self.held_pairs, held_back)
        anchors = _chosen(range(len(self.collator.anchors)), self.held_anchors, held_back)
        return datasets.Dataset.from_dict(self.collator.dataset_rows(pairs, anchors))

    def length_ratio(self) -> float:
        """Tokens of chosen over tokens of rejected answers."""
        return sum(len(p.chosen_ids) for p in self.pairs) / max(1, sum(len(p.rejected_ids) for p in self.pairs))


def read_material(manifest: Manifest, student: Student) -> Material:
    """Read, encode, fit and split. Raises StageFailedError where no pair fits or a file changed."""
    wanted, tokenizer = manifest.hyperparameters, student.loaded.tokenizer
    limit, eos_id = min(wanted.max_length, student.loaded.info.context_length), tokenizer.eos_token_id
    rows = read_rows(manifest.pairs_file, manifest.pairs_sha256)
    encoded = [(row, encode_pair(student.renderer, row, manifest.blobs, eos_id)) for row in rows]
    pairs = [(row, pair) for row, pair in encoded if pair.num_tokens <= limit]
    if not pairs:
        raise StageFailedError(
            f"none of {len(rows)} pairs fits {limit} tokens, the smaller of learner.train.max_length and the context"
        )
    anchors = [(row, anchor) for row, anchor in _anchors(manifest, student, eos_id) if anchor.num_tokens <= limit]
    held_pairs, held_anchors = split_rows(
        [row for row, _ in pairs], [row for row, _ in anchors], wanted.validation_share, manifest.seed
    )
    pad_id = eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collator = PairCollator.of(
        [pair for _, pair in pairs], student.renderer, pad_id, student.loaded.parts.model, [a for _, a in anchors]
    )
    return Material(collator, held_pairs, held_anchors, len(rows) - len(pairs))


def _anchors(manifest: Manifest, student: Student, eos_id: int) -> list[tuple[dict[str, Any], EncodedAnchor]]:
    path: Path | None = manifest.anchors_file
    if path is None or not manifest.hyperparameters.anchor_weight:
        return []
    rows = read_rows(path, manifest.anchors_sha256)
    return [(row, encode_anchor(student.renderer, row, manifest.blobs, eos_id)) for row in rows]


def _chosen(indices: Iterable[int], held: frozenset[int], held_back: bool) -> list[int]:
    return [index for index in indices if (index in held) == held_back]
