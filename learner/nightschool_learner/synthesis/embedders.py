"""Embedders: texts as vectors of length 1, so that a description can be held against what blobs are found by.

`lexical` needs no model: hashed words and parts of words, rare ones counting more (TF-IDF). `endpoint` takes vectors
from an OpenAI-compatible `/embeddings`. Deviation from SPORT, which embeds with BGE-M3: a dense model is another one to
serve, and an operator who has one names it here.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
from nightschool_server.config.files import EmbedderConfig
from nightschool_server.uninterrupted import uninterrupted

from nightschool_learner.endpoint import Endpoint
from nightschool_learner.endpoint_records import EndpointCall, insert_call
from nightschool_learner.parallel import together
from nightschool_learner.sampling import until_resumed
from nightschool_learner.screening import words_of
from nightschool_learner.stages import Cycle

Vectors = npt.NDArray[np.float32]
"""(texts, dimensions); every row of length 1, or 0 where a text has no words."""

NUM_BUCKETS = 8192
PART_CHARS = 4
PART_WEIGHT = 0.5
"""Of a part of a word against a whole one: "chart" and "charts" are not the same word and nearly so."""
SILENT = frozenset(
    words_of("a an and are as at be by for from has in is it its of on or that the their there this to was which with")
)
"""Words that say nothing of what is in a picture or file; among few texts their rarity does not show it."""
BATCH = 64
"""Texts that an endpoint is asked for at once."""
ROLE = "embedder"


class Embedder(Protocol):
    """Turns texts into vectors."""

    @property
    def name(self) -> str:
        """Under which vectors are kept; empty where they are not worth it."""
        ...

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """A vector for each text."""
        ...


@dataclass(frozen=True)
class LexicalEmbedder:
    """Hashed words and parts of words, weighed by how rare they are among the texts that can be found."""

    weights: npt.NDArray[np.float32]
    """Inverse document frequency of each bucket."""
    name: str = ""

    @classmethod
    def of(cls, corpus: Sequence[str]) -> LexicalEmbedder:
        """Weights from the texts that can be found."""
        num_with = np.zeros(NUM_BUCKETS, dtype=np.float32)
        for text in corpus:
            num_with[list({bucket for bucket, _ in _features(text)})] += 1
        return cls(np.log((1 + len(corpus)) / (1 + num_with)) + 1)

    async def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), NUM_BUCKETS), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for bucket, weight in _features(text):
                row[bucket] += weight
        return _unit(vectors * self.weights)


@dataclass(frozen=True)
class EndpointEmbedder:
    """Vectors of a model behind an endpoint."""

    endpoint: Endpoint
    name: str

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Raises as `Endpoint.embed` does."""
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        answers = await together(*(self.endpoint.embed(batch) for batch in batches))
        return _unit(np.array([vector for answer in answers for vector in answer.vectors], dtype=np.float32))


@asynccontextmanager
async def open_embedder(cycle: Cycle, config: EmbedderConfig, corpus: Sequence[str]) -> AsyncIterator[Embedder]:
    """The embedder that `config` names; `corpus` are the texts that can be found."""
    if config.kind == "lexical":
        yield LexicalEmbedder.of(corpus)
        return

    async def record(call: EndpointCall) -> None:
        await uninterrupted(asyncio.to_thread(insert_call, cycle.store, call))

    allowed = partial(until_resumed, cycle)
    endpoint = Endpoint(config.endpoint, ROLE, cycle.store.get_blob, record, cycle.id or None, until_allowed=allowed)
    async with endpoint:
        yield EndpointEmbedder(endpoint, f"{config.endpoint.model}@{config.endpoint.base_url}")


def _features(text: str) -> list[tuple[int, float]]:
    """(bucket, weight) of every word and part of a word; a word that comes again counts less each time."""
    counts: Counter[tuple[str, float]] = Counter()
    for word in words_of(text):
        if word in SILENT:
            continue
        counts[word, 1.0] += 1
        padded = f" {word} "
        counts.update((padded[i : i + PART_CHARS], PART_WEIGHT) for i in range(len(padded) - PART_CHARS + 1))
    return [
        (zlib.crc32(f"{weight}{part}".encode()) % NUM_BUCKETS, weight * (1 + math.log(num)))
        for (part, weight), num in counts.items()
    ]


def _unit(vectors: npt.NDArray[np.float32]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return unit
