"""What there is to be found: the pictures and files of the cycle's seeds, and the text that each is found by.

A picture is found by a caption, which a model writes once for a blob; any other file by its name and its first text.
Only what users sent with requests that this cycle may learn from is here, so nothing of a held-out task, of a caller
who was forgotten or who did not allow it.

Owns the collection and the captioner's wording. Similarity and choice are `shelf.py`'s.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nightschool_server.app import App, load_evaluation
from nightschool_server.chat import File, system, user
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError, InvalidRequestError, NotFoundError

from nightschool_learner.errors import EndpointError
from nightschool_learner.parallel import for_each
from nightschool_learner.prompts import visible
from nightschool_learner.roles import Model
from nightschool_learner.sampling import derive_seed
from nightschool_learner.seed_records import Seed
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesis.description_records import (
    OWN_TEXT,
    Description,
    descriptions_by,
    insert_description,
)
from nightschool_learner.synthesis.plan import PICTURE, type_of
from nightschool_learner.synthesis.reading import IMAGE_TYPES, FileReader
from nightschool_learner.writer import Writer

logger = logging.getLogger(__name__)

MAX_TEXT_CHARS = 1000
"""Of a file's first text."""
CAPTIONER_SYSTEM = (
    "Describe the picture in one or two sentences, so that somebody who looks for it finds it: what kind of picture it "
    "is, what it shows, and every text and number that can be read in it. Write nothing else."
)


@dataclass(frozen=True)
class Document:
    """A picture or file that a task may bring."""

    sha256: str
    name: str
    """Empty for a picture that was shown."""
    type: str
    """`picture`, or what the name ends in."""
    media_type: str
    size_bytes: int
    response_id: str
    """The request that brought it."""
    text: str = ""
    """What it is found by, beside its name."""

    @property
    def found_by(self) -> str:
        """Name and text."""
        return f"{self.name} {self.text}".strip()

    @property
    def is_image(self) -> bool:
        """Whether a caption says what is in it."""
        return self.type == PICTURE or self.type in IMAGE_TYPES


def documents_of(cycle: Cycle, seeds: Sequence[Seed], limit: int) -> list[Document]:
    """The first `limit` pictures and files of `seeds`, without text yet: each blob once in each kind, none held out."""
    found: dict[tuple[str, str], Document] = {}
    held_out = held_out_blobs(cycle.app)
    for document in (one for seed in seeds for one in _documents(seed)):
        if len(found) == limit:
            break
        key = (document.sha256, document.type)
        if key not in found and document.sha256 not in held_out and cycle.store.has_blob(document.sha256):
            found[key] = document
    return list(found.values())


def held_out_blobs(app: App) -> frozenset[str]:
    """sha256 of every picture and file of the application's held-out tasks."""
    tasks = load_evaluation(app).tasks if app.evaluation is not None else ()
    return frozenset(
        hashlib.sha256(path.read_bytes()).hexdigest() for task in tasks for path in (*task.images, *task.files)
    )


def _documents(seed: Seed) -> Iterator[Document]:
    for sha256 in seed.images:
        yield Document(sha256, "", PICTURE, "", 0, seed.response_id)
    for file in seed.files:
        yield Document(file.sha256, file.name, type_of(file.name), file.media_type, file.size_bytes, seed.response_id)


@dataclass(frozen=True)
class Describer:
    """Sees to it that each document has a text."""

    cycle: Cycle
    captioner: Model
    max_tokens: int
    reader: FileReader
    writer: Writer
    concurrency: int

    async def describe(self, documents: Sequence[Document]) -> list[Document]:
        """The documents with their texts; what could not be described is left out."""
        store = self.cycle.store
        captions, texts = descriptions_by(store, self.captioner.name), descriptions_by(store, OWN_TEXT)

        async def see_to(document: Document) -> None:
            known = captions if document.is_image else texts
            if document.sha256 in known:
                return
            said = await self._caption(document) if document.is_image else (await self._text(document), 0)
            if said is None:
                return
            text, tokens = said
            known[document.sha256] = text
            row = Description(document.sha256, self.captioner.name if document.is_image else OWN_TEXT, text, tokens)
            await self.writer.write(lambda db: insert_description(db, row, self.cycle.id))

        blobs = {document.sha256: document for document in documents}
        await for_each(self.cycle, blobs.values(), see_to, self.concurrency)
        described = [(one, (captions if one.is_image else texts).get(one.sha256)) for one in documents]
        return [replace(one, text=text) for one, text in described if text is not None]

    async def _caption(self, document: Document) -> tuple[str, int] | None:
        sampling = Sampling(
            max_tokens=self.max_tokens, temperature=0.0, seed=derive_seed(self.cycle.seed, "caption", document.sha256)
        )
        prompt = Prompt((system(CAPTIONER_SYSTEM), user("Picture:", [document.sha256])))
        try:
            samples = await self.captioner.sampler.sample(prompt, sampling, adapter=self.captioner.adapter)
        except (EndpointError, ContextOverflowError, InvalidRequestError, NotFoundError) as error:
            logger.warning(
                "event=caption_failed cycle=%s sha256=%s reason=%r", self.cycle.id, document.sha256, str(error)
            )
            return None
        answer = samples.answers[0]
        caption = " ".join(visible(answer.text).split())
        return (caption, samples.num_completion_tokens or len(answer.token_ids)) if caption else None

    async def _text(self, document: Document) -> str:
        file = File(document.name, document.media_type, document.size_bytes, document.sha256)
        try:
            return visible(await self.reader.text_of(self.cycle.store, file, MAX_TEXT_CHARS))
        except NotFoundError:
            return ""
