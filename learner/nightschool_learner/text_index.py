"""Which texts are nearly the same: an index of weighted runs of letters and pairs of words.

Texts with other numbers, or the same numbers in another order, are never alike, however similar their words: "12 plus
7" is not "13 plus 7". All else is the cosine of TF-IDF vectors, whose features are hashed, so that a new word costs
nothing. Runs of letters forgive a typo or another ending; pairs of words see to the order a little. Owns numbers alone;
what is compared with what, and from where on two texts count as one, is `screening.py`'s.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

SPACE = 1 << 18
"""Places for features; a text has about 100, so that two of them hardly ever share one."""
RUNS = (2, 3)
"""Letters in a run; runs do not cross words."""
PAIR = 0.5
"""Weight of a pair of words beside that of a run. More, and one changed word makes another text."""

Words = Sequence[str]
Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]

_DIGITS = re.compile(r"\d+")


def numbers_of(words: Words) -> tuple[str, ...]:
    """Every run of digits, in order."""
    return tuple(run for word in words for run in _DIGITS.findall(word))


def features_of(words: Words) -> Mapping[int, float]:
    """Places of the features of a text and the weight of each, before it is known how rare it is."""
    found: dict[str, float] = defaultdict(float)
    for word in words:
        padded = f" {word} "
        for length in RUNS:
            for start in range(len(padded) - length + 1):
                found[padded[start : start + length]] += 1
    for pair in pairwise(words):
        found["  ".join(pair)] += PAIR
    placed: dict[int, float] = defaultdict(float)
    for feature, weight in found.items():
        placed[zlib.crc32(feature.encode()) % SPACE] += weight
    return placed


class TextIndex:
    """Texts, to be asked which of them are nearly the same as another one."""

    def __init__(self, corpus: Iterable[Words] = ()) -> None:
        """`corpus` says which features are rare and therefore weigh more; it is not indexed."""
        self._num_with: Floats = np.zeros(SPACE, np.float32)
        num_texts = 0
        for words in corpus:
            self._num_with[list(features_of(words))] += 1
            num_texts += 1
        self._num_texts = num_texts
        self._shelves: dict[tuple[str, ...], _Shelf] = {}
        self._asked: Floats = np.zeros(SPACE, np.float32)
        self._size = 0

    def add(self, words: Words) -> int:
        """Index a text. Returns its number: 0 for the first, 1 for the second, ..."""
        number = self._size
        self._size += 1
        if words:
            places, weights = self._vector(words)
            self._shelves.setdefault(numbers_of(words), _Shelf()).add(number, places, weights)
        return number

    def alike(self, words: Words, min_similarity: float) -> list[int]:
        """Numbers of the texts with the same numbers whose similarity to `words` is at least that, nearest first."""
        shelf = self._shelves.get(numbers_of(words))
        if shelf is None or not words:
            return []
        places, weights = self._vector(words)
        self._asked[places] = weights
        similarities = shelf.dot(self._asked)
        self._asked[places] = 0
        order = np.argsort(-similarities, kind="stable")
        return [shelf.numbers[i] for i in order if similarities[i] >= min_similarity]

    def _vector(self, words: Words) -> tuple[Places, Floats]:
        """Features and their weights times ln((1 + N) / (1 + n)) + 1, of length 1."""
        features = features_of(words)
        places = np.fromiter(features, np.int64, len(features))
        rarity = np.log((1 + self._num_texts) / (1 + self._num_with[places])) + 1
        weights = np.fromiter(features.values(), np.float32, len(features)) * rarity
        return places, (weights / np.linalg.norm(weights)).astype(np.float32)


@dataclass
class _Shelf:
    """The texts that share their numbers, one behind the other in flat arrays."""

    numbers: list[int] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _num_features: int = 0
    _places: list[Places] = field(default_factory=list)
    _weights: list[Floats] = field(default_factory=list)

    def add(self, number: int, places: Places, weights: Floats) -> None:
        self.numbers.append(number)
        self._starts.append(self._num_features)
        self._num_features += len(places)
        self._places.append(places)
        self._weights.append(weights)

    def dot(self, asked: Floats) -> Floats:
        """The product of each text's vector with `asked`, which has a value for every place."""
        if len(self._places) > 1:
            self._places, self._weights = [np.concatenate(self._places)], [np.concatenate(self._weights)]
        products: Floats = np.add.reduceat(self._weights[0] * asked[self._places[0]], self._starts)
        return products
