"""What is the same text, and what must never be practised: duplicates, copies and held-out tasks.

Owns the comparisons, pure functions over text and image hashes. Seeds and written tasks pass through
the same screen. A held-out task with a picture is its text and its picture together: any held-out
picture is refused, whatever the text; the same question about another picture is a task of its own.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nightschool_server.app import App, load_evaluation

NGRAM_WORDS = 13
"""Length of the word n-grams that count as overlap with a held-out task: the field's usual bound
(Brown et al., arXiv 2005.14165, appendix C)."""

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
    """The evaluation set as a screen: says whether a task is, or contains, a held-out one."""

    def __init__(self, tasks: Iterable[TaskKey]) -> None:
        """`tasks` are the keys of every evaluation task; images are sha256 of their encoded bytes."""
        known = list(tasks)
        self._images = {sha256 for key in known for sha256 in key.images}
        text_only = [key.words for key in known if not key.images and key.words]
        self._texts: dict[int, set[tuple[str, ...]]] = {}
        for words in text_only:
            self._texts.setdefault(len(words), set()).add(words)
        self._ngrams = {gram for words in text_only for gram in ngrams(words, NGRAM_WORDS)}

    def match(self, key: TaskKey) -> str | None:
        """Why `key` may not be practised: `image`, `text` or `ngram`; None where it may."""
        if any(sha256 in self._images for sha256 in key.images):
            return "image"
        for length, texts in self._texts.items():
            if not texts.isdisjoint(ngrams(key.words, length)):
                return "text"
        if not self._ngrams.isdisjoint(ngrams(key.words, NGRAM_WORDS)):
            return "ngram"
        return None


def held_out_of(app: App) -> HeldOut:
    """The screen of an application's evaluation set; an application without one holds nothing out."""
    if app.evaluation is None:
        return HeldOut(())
    return HeldOut(
        task_key(task.prompt, [hashlib.sha256(path.read_bytes()).hexdigest() for path in task.images])
        for task in load_evaluation(app).tasks
    )
