"""The rows of what blobs are found by: descriptions and their vectors, each made once for a blob.

Owns the SQL of `descriptions` and `embeddings`. A row goes with its blob.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nightschool_server.store.store import Store

from nightschool_learner.synthesis.embedders import Vectors

OWN_TEXT = "text"
"""Stands for the model where a file is found by its own text."""


@dataclass(frozen=True)
class Description:
    """What a blob is found by."""

    sha256: str
    model: str
    """Who described it, or `OWN_TEXT`."""
    text: str
    tokens: int


def descriptions_by(store: Store, model: str) -> dict[str, str]:
    """What `model` said of every blob that it has described, by sha256."""
    rows = store.query("SELECT sha256, text FROM descriptions WHERE model = ?", (model,))
    return {row["sha256"]: row["text"] for row in rows}


def insert_description(db: sqlite3.Connection, row: Description, cycle_id: str) -> None:
    """Write what a blob is found by, unless it was forgotten meanwhile; `cycle_id` had it described."""
    db.execute(
        "INSERT OR IGNORE INTO descriptions (sha256, model, text, tokens, cycle_id, created_at) "
        "SELECT sha256, ?, ?, ?, ?, ? FROM blobs WHERE sha256 = ?",
        (row.model, row.text, row.tokens, cycle_id, time.time(), row.sha256),
    )


def caption_counts(store: Store, cycle_id: str) -> dict[str, int]:
    """Pictures that the cycle had described, and the tokens of that."""
    row = store.query(
        "SELECT COUNT(*) AS n, COALESCE(SUM(tokens), 0) AS tokens FROM descriptions WHERE cycle_id = ? AND model <> ?",
        (cycle_id, OWN_TEXT),
    )[0]
    return {"captions": row["n"], "captioner_tokens": row["tokens"]} if row["n"] else {}


def known_vectors(store: Store, model: str, texts: Sequence[tuple[str, str]]) -> dict[int, Vectors]:
    """The vectors that are there already, by position in `texts`, which are (sha256, text)."""
    rows = store.query("SELECT sha256, digest, vector FROM embeddings WHERE model = ?", (model,))
    kept = {(row["sha256"], row["digest"]): row["vector"] for row in rows}
    found = {i: kept.get((sha256, _digest(text))) for i, (sha256, text) in enumerate(texts)}
    return {i: np.frombuffer(vector, dtype="<f4") for i, vector in found.items() if vector is not None}


def insert_vectors(db: sqlite3.Connection, model: str, texts: Sequence[tuple[str, str]], vectors: Vectors) -> None:
    """Keep the vectors of `texts`, which are (sha256, text)."""
    db.executemany(
        "INSERT OR IGNORE INTO embeddings (sha256, digest, model, vector) SELECT sha256, ?, ?, ? FROM blobs "
        "WHERE sha256 = ?",
        [
            (_digest(text), model, vector.astype("<f4").tobytes(), sha256)
            for (sha256, text), vector in zip(texts, vectors, strict=True)
        ],
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
