"""What a run trains on and what it only looks at: the rows of its files as tokens, fitted to the context, split.

Reads the files that the manifest names, encodes them (`trainer_data.py`), drops what is too long, and holds back the
share that `validation.py` chooses. Callers' corrections join the anchors of pairs, or the answers of SFT and KTO;
thumbs join KTO's. Imports torch; used by the trainer process alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import Manifest
from nightschool_learner.trainer_answers import AnswerCollator, answers_of
from nightschool_learner.trainer_data import (
    EncodedAnchor,
    EncodedPair,
    PairCollator,
    encode_answer,
    encode_pair,
    read_rows,
)
from nightschool_learner.trainer_model import Student
from nightschool_learner.validation import split_rows


@dataclass(frozen=True)
class Material:
    """The encoded rows of a run."""

    collator: PairCollator
    """Holds all pairs and anchors."""
    batches: PairCollator | AnswerCollator
    """Makes what is trained on of them."""
    held_pairs: frozenset[int]
    """Indices of those that are only looked at."""
    held_anchors: frozenset[int]
    num_dropped: int
    """Pairs that were too long."""
    num_told: int
    """Corrections and thumbs among what is trained on."""

    @property
    def pairs(self) -> Sequence[EncodedPair]:
        """All pairs, those that are held back among them."""
        return self.collator.pairs

    def dataset(self, *, held_back: bool) -> Any:
        """The rows to look at, or those to train on, as a `datasets.Dataset` of indices."""
        import datasets

        anchors = _chosen(range(len(self.collator.anchors)), self.held_anchors, held_back)
        if isinstance(self.batches, PairCollator):
            pairs = _chosen(range(len(self.pairs)), self.held_pairs, held_back)
            return datasets.Dataset.from_dict(self.batches.dataset_rows(pairs, anchors))
        answers = self.batches.answers
        held = frozenset(i for i, answer in enumerate(answers) if answer.pair in self.held_pairs)
        return datasets.Dataset.from_dict(
            self.batches.dataset_rows(_chosen(range(len(answers)), held, held_back), anchors)
        )

    def length_ratio(self) -> float:
        """Tokens of chosen over tokens of rejected answers."""
        return sum(len(p.chosen_ids) for p in self.pairs) / max(1, sum(len(p.rejected_ids) for p in self.pairs))


def read_material(manifest: Manifest, student: Student) -> Material:
    """Read, encode, fit and split. Raises StageFailedError where no pair fits or a file changed."""
    wanted, loaded = manifest.hyperparameters, student.loaded
    limit, eos_id = min(wanted.max_length, loaded.info.context_length), loaded.tokenizer.eos_token_id
    rows = read_rows(manifest.pairs_file, manifest.pairs_sha256)
    encoded = [(row, encode_pair(student.renderer, row, manifest.blobs, eos_id)) for row in rows]
    pairs = [(row, pair) for row, pair in encoded if pair.num_tokens <= limit]
    if not pairs:
        raise StageFailedError(
            f"none of {len(rows)} pairs fits {limit} tokens, the smaller of learner.train.max_length and the context"
        )
    read = _Reader(manifest, student, limit)
    anchors = read.rows(manifest.anchors_file, manifest.anchors_sha256, "answer") if wanted.anchor_weight else []
    corrections = read.rows(manifest.corrections_file, manifest.corrections_sha256, "completion")
    thumbs = read.rows(manifest.thumbs_file, manifest.thumbs_sha256, "completion") if wanted.method == "kto" else []
    if wanted.method == "dpo":
        corrections = corrections if wanted.anchor_weight else []
        anchors = anchors + corrections
    held_pairs, held_anchors = split_rows(
        [row for row, _ in pairs], [row for row, _ in anchors], wanted.validation_share, manifest.seed
    )
    pad_id = eos_id if loaded.tokenizer.pad_token_id is None else loaded.tokenizer.pad_token_id
    collator = PairCollator.of(
        [pair for _, pair in pairs], student.renderer, pad_id, loaded.parts.model, [a for _, a in anchors]
    )
    batches: PairCollator | AnswerCollator = collator
    if wanted.method != "dpo":
        told = [(one, True) for _, one in corrections] + [(one, bool(row["label"])) for row, one in thumbs]
        answers = answers_of(collator.pairs, told, wanted.method, manifest.seed)
        batches = AnswerCollator(answers, collator, wanted.method)
    return Material(collator, batches, held_pairs, held_anchors, len(rows) - len(pairs), len(corrections) + len(thumbs))


@dataclass(frozen=True)
class _Reader:
    """Reads files of single answers."""

    manifest: Manifest
    student: Student
    limit: int

    def rows(self, path: Path | None, sha256: str, side: str) -> list[tuple[dict[str, Any], EncodedAnchor]]:
        """The rows of a file that fit, and as tokens; none where there is no file."""
        if path is None:
            return []
        renderer, eos_id = self.student.renderer, self.student.loaded.tokenizer.eos_token_id
        rows = read_rows(path, sha256)
        encoded = [(row, encode_answer(renderer, row, self.manifest.blobs, eos_id, side=side)) for row in rows]
        return [(row, one) for row, one in encoded if one.num_tokens <= self.limit]


def _chosen(indices: Iterable[int], held: frozenset[int], held_back: bool) -> list[int]:
    return [index for index in indices if (index in held) == held_back]
