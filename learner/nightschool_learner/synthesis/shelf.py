"""The shelf: pictures and files that a task may bring, found by what they are about, none of them too often.

Owns similarity, threshold and reuse. What is on it and the texts it is found by are `describing.py`'s, vectors
`embedders.py`'s. Deviation from SPORT, which takes the nearest one whatever its distance and however often: below
`min_similarity` nothing was found, and of the `top_k` nearest the first that is not used up is taken.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from nightschool_server.config.files import FilesConfig
from nightschool_server.store.store import Store

from nightschool_learner.synthesis.describing import Document
from nightschool_learner.synthesis.description_records import insert_vectors, known_vectors
from nightschool_learner.synthesis.embedders import Embedder, Vectors
from nightschool_learner.synthesis.plan import PlannedFile
from nightschool_learner.writer import Writer


@dataclass(frozen=True)
class Found:
    """A document that stands in for a planned file."""

    document: Document
    similarity: float


@dataclass
class Shelf:
    """What can be found in one cycle."""

    config: FilesConfig
    documents: Sequence[Document]
    vectors: Vectors
    """Of each document."""
    embedder: Embedder
    taken: Counter[str] = field(default_factory=Counter)
    """How many tasks each blob is in, those in the making included."""

    @property
    def types(self) -> Mapping[str, int]:
        """How many there are of each type."""
        return Counter(document.type for document in self.documents)

    async def find(self, planned: PlannedFile, without: Collection[str] = ()) -> Found | None:
        """The document that stands in for a planned file, which is then taken; None where there is none.

        `without` are blobs that the task has already.
        """
        fitting = [i for i, document in enumerate(self.documents) if document.type == planned.type]
        if not fitting:
            return None
        [query] = await self.embedder.embed([f"{planned.name} {planned.description}"])
        similarities = self.vectors[fitting] @ query
        nearest = np.argsort(-similarities, kind="stable")[: self.config.top_k]
        for place in nearest:
            document, similarity = self.documents[fitting[place]], float(similarities[place])
            if similarity < self.config.min_similarity:
                return None
            if document.sha256 not in without and self.taken[document.sha256] < self.config.max_reuse:
                self.taken[document.sha256] += 1
                return Found(document, similarity)
        return None

    def give_back(self, sha256: str) -> None:
        """Undo a taking: the task was dropped."""
        self.taken[sha256] -= 1


async def vectors_of(store: Store, writer: Writer, embedder: Embedder, documents: Sequence[Document]) -> Vectors:
    """The vector of each document, kept where the embedder has a name: each text is embedded once."""
    texts = [(document.sha256, document.found_by) for document in documents]
    if not texts:
        return np.zeros((0, 0), dtype=np.float32)
    if not embedder.name:
        return await embedder.embed([text for _, text in texts])
    known = await asyncio.to_thread(known_vectors, store, embedder.name, texts)
    if missing := [i for i in range(len(texts)) if i not in known]:
        made = await embedder.embed([texts[i][1] for i in missing])
        await writer.write(lambda db: insert_vectors(db, embedder.name, [texts[i] for i in missing], made))
        known |= dict(zip(missing, made, strict=True))
    return np.stack([known[i] for i in range(len(texts))])
