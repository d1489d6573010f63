"""What is the same text, and what must never be practised: duplicates, copies and held-out tasks.

Owns the comparisons, over text and pictures. Seeds and written tasks pass through the same screen: first what is the
same, then what is nearly the same (`text_index.py`, `picture_index.py`). A held-out task with a picture is its text and
its picture together: any held-out picture is refused, whatever the text; the same question about another picture is a
task of its own. What is held out is gathered by `contamination.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nightschool_server.config.screening import ScreenConfig

from nightschool_learner.picture_index import Look, PictureIndex
from nightschool_learner.text_index import TextIndex

NGRAM_WORDS = 13
"""Length of the word n-grams that count as overlap with a held-out task: the field's usual bound
(Brown et al., arXiv 2005.14165, appendix C)."""

LookOf = Callable[[str], Look | None]
"""How the picture of a sha256 looks; None where it is none, or gone."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class TaskKey:
    """What makes two tasks the same: their words and their pictures."""

    words: tuple[str, ...]
    images: tuple[str, ...]


def words_of(text: str) -> tuple[str, ...]:
    """The words of `text`: compatibility-normalised, case folded, without punctuation."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def task_key(text: str, images: Sequence[str] = ()) -> TaskKey:
    """The key under which duplicates meet; the order of pictures counts, as it does to the model."""
    return TaskKey(words_of(text), tuple(images))


def ngrams(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """Every run of `length` words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


class HeldOut:
    """The evaluation sets as a screen: says whether a task is, or contains, a held-out one."""

    def __init__(self, tasks: Iterable[TaskKey], similar: Similar | None = None) -> None:
        """`tasks` are the keys of every held-out task; images are sha256 of their encoded bytes."""
        known = list(tasks)
        self._images = {sha256 for key in known for sha256 in key.images}
        text_only = [key.words for key in known if not key.images and key.words]
        self._texts: dict[int, set[tuple[str, ...]]] = {}
        for words in text_only:
            self._texts.setdefault(len(words), set()).add(words)
        self._ngrams = {gram for words in text_only for gram in ngrams(words, NGRAM_WORDS)}
        self._similar = similar

    def match(self, key: TaskKey) -> str | None:
        """Why `key` may not be practised: `image`, `text`, `ngram`, `image_similar`, `similar`; None where it may."""
        if any(sha256 in self._images for sha256 in key.images):
            return "image"
        for length, texts in self._texts.items():
            if not texts.isdisjoint(ngrams(key.words, length)):
                return "text"
        if not self._ngrams.isdisjoint(ngrams(key.words, NGRAM_WORDS)):
            return "ngram"
        return self._similar.match(key) if self._similar else None


class Similar:
    """What is nearly a held-out task."""

    def __init__(
        self, config: ScreenConfig, *, texts: Sequence[Sequence[str]], looks: Iterable[Look], look: LookOf
    ) -> None:
        """`texts` are the words of held-out tasks without pictures, `looks` those of held-out pictures."""
        self._config = config
        self._texts = TextIndex(texts)
        for words in texts:
            self._texts.add(words)
        self._pictures = PictureIndex(looks)
        self._look = look

    def match(self, key: TaskKey) -> str | None:
        """`image_similar`, `similar` or None."""
        max_distance, min_similarity = self._config.max_image_distance, self._config.max_held_out_similarity
        if max_distance >= 0 and len(self._pictures):
            looks = [look for sha256 in key.images if (look := self._look(sha256))]
            if any(self._pictures.has_like(look, max_distance) for look in looks):
                return "image_similar"
        if min_similarity < 1 and self._texts.alike(key.words, min_similarity):
            return "similar"
        return None


@dataclass
class Pool:
    """The tasks that are there already, of this cycle and of earlier ones."""

    config: ScreenConfig
    corpus: Iterable[Sequence[str]]
    """Texts of the application, which say what words are common in it."""
    look: LookOf
    _keys: list[TaskKey] = field(default_factory=list)
    _known: set[TaskKey] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._texts = TextIndex(self.corpus)

    def add(self, key: TaskKey) -> None:
        """A task that is there from now on."""
        if key not in self._known:
            self._known.add(key)
            self._keys.append(key)
            self._texts.add(key.words)

    def match(self, key: TaskKey) -> str | None:
        """`duplicate`, `near_duplicate`, or None for a task of its own."""
        if key in self._known:
            return "duplicate"
        if self.config.max_task_similarity >= 1:
            return None
        alike = self._texts.alike(key.words, self.config.max_task_similarity)
        return "near_duplicate" if any(self._shows_the_same(key, self._keys[i]) for i in alike) else None

    def _shows_the_same(self, one: TaskKey, other: TaskKey) -> bool:
        pairs = zip(one.images, other.images, strict=False)
        return len(one.images) == len(other.images) and all(self._is_like(a, b) for a, b in pairs)

    def _is_like(self, sha256: str, other: str) -> bool:
        if sha256 == other:
            return True
        max_distance = self.config.max_image_distance
        looks = (self.look(sha256), self.look(other)) if max_distance >= 0 else (None, None)
        return looks[0] is not None and looks[1] is not None and looks[0].is_like(looks[1], max_distance)
