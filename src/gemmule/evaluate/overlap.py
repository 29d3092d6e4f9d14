"""What a text has in common with the training data: spans of words, found by their hashes in one pass.

Words are compared in lower case and without punctuation. Memory grows with the text, not with the training data.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemmule.data.corpus import Corpus
from gemmule.tokenizer import Tokenizer

SPAN = 13  # words of the spans that count as overlap, as for GPT-3
SHORTEST = 5  # words of a copied span; shorter ones are everybody's
_MOST_TOKENS = 50_000_000  # of training data that are read: about a minute, as estimated
_BATCH = 4096  # documents that are decoded at once
_BASE = np.uint64(0x9E3779B97F4A7C15)

Words = npt.NDArray[np.uint64]  # a random number for each word of a text
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class TrainingText(NamedTuple):
    """The training documents of a run, as text."""

    corpus: Corpus
    tokenizer: Tokenizer

    @property
    def documents(self) -> int:
        """How many documents are read, the first ones: those of 50 million tokens."""
        return int(np.searchsorted(np.cumsum(self.corpus.lengths, dtype=np.int64), _MOST_TOKENS, side="right")) or 1

    @property
    def share(self) -> float:
        """The share of the documents that is read."""
        return min(self.documents, self.corpus.documents) / self.corpus.documents

    def read(self, progress: Callable[[str, int, int | None], None]) -> Iterator[list[str]]:
        """Yield the texts of documents, some thousand at a time."""
        count = min(self.documents, self.corpus.documents)
        for first in range(0, count, _BATCH):
            numbers = range(first, min(first + _BATCH, count))
            rows = [self.corpus.read(number, 0, int(self.corpus.lengths[number])).tolist() for number in numbers]
            yield self.tokenizer.decode_batch(rows)
            progress("searching the training data", numbers.stop, count)


class Vocabulary:
    """Numbers for the words of the texts that are compared; all other words are one."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, text: str) -> Words:
        """Return the words of a text, which are known from now on."""
        numbers = self._numbers
        return _scramble([numbers.setdefault(word, len(numbers) + 2) for word in words_of(text)])

    def known(self, texts: Iterable[str]) -> Words:
        """Return the words of texts, with an end that no text has after each."""
        numbers, found = self._numbers, []
        for text in texts:
            found += [numbers.get(word, 0) for word in words_of(text)]
            found.append(1)
        return _scramble(found)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


class Spans:
    """The spans of 13 words of documents, to be looked for in the training data."""

    def __init__(self) -> None:
        self._vocabulary = Vocabulary()
        self._hashes: list[Words] = []

    def add(self, text: str) -> None:
        """Add a document."""
        self._hashes.append(_hashes(self._vocabulary.add(text), SPAN))

    def overlapping(self, training: Iterable[Sequence[str]]) -> npt.NDArray[np.bool_]:
        """Return for each document whether a span of it occurs in the training texts."""
        everything = np.concatenate([np.zeros(0, np.uint64), *self._hashes])
        distinct, places = np.unique(everything, return_inverse=True)
        seen = np.zeros(len(distinct), dtype=bool)
        for texts in training:
            _mark(seen, distinct, _hashes(self._vocabulary.known(texts), SPAN))
        ends = np.cumsum([len(hashes) for hashes in self._hashes])
        return np.array([bool(part.any()) for part in np.split(seen[places], ends)[: len(self._hashes)]], dtype=bool)


def longest_copied_spans(texts: Sequence[str], training: Iterable[Sequence[str]]) -> list[int]:
    """Return for each text how many words its longest span that occurs in the training texts has, 0 for below 5."""
    vocabulary = Vocabulary()
    given = [vocabulary.add(text) for text in texts]
    levels = list(_levels(given))
    seen = [np.zeros(len(level.distinct), dtype=bool) for level in levels]
    for some in training:
        words = vocabulary.known(some)
        places = np.arange(max(0, len(words) - SHORTEST + 1))
        hashes = _hashes(words, SHORTEST)
        for length, (level, own) in enumerate(zip(levels, seen, strict=True), start=SHORTEST):
            kept = _mark(own, level.distinct, hashes)
            kept &= places + length < len(words)
            places, hashes = places[kept], hashes[kept]
            if not len(places):
                break
            hashes = hashes * _BASE + words[places + length]
    longest = [0] * len(texts)
    for length, (level, own) in enumerate(zip(levels, seen, strict=True), start=SHORTEST):
        for number in np.unique(level.owners[own[level.places]]).tolist():
            longest[number] = length
    return longest


class _Level(NamedTuple):
    """All spans of one length."""

    distinct: Words  # their hashes, sorted
    places: npt.NDArray[np.int64]  # index of each span's hash
    owners: npt.NDArray[np.int64]  # text of each span


def _levels(texts: Sequence[Words]) -> Iterator[_Level]:
    """Yield the spans of each length from 5 on."""
    for length in range(SHORTEST, max((len(words) for words in texts), default=0) + 1):
        hashes = [_hashes(words, length) for words in texts]
        distinct, places = np.unique(np.concatenate(hashes), return_inverse=True)
        yield _Level(distinct, places, np.repeat(np.arange(len(texts)), [len(part) for part in hashes]))


def _hashes(words: Words, length: int) -> Words:
    """Return the hash of each span of so many words, by where it begins."""
    count = max(0, len(words) - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * _BASE + words[offset : offset + count]
    return hashes


def _mark(seen: npt.NDArray[np.bool_], distinct: Words, hashes: Words) -> npt.NDArray[np.bool_]:
    """Note which of the distinct hashes occur among `hashes`; return which of those they are."""
    if not len(distinct):
        return np.zeros(len(hashes), dtype=bool)
    places = np.searchsorted(distinct, hashes).clip(max=len(distinct) - 1)
    hits: npt.NDArray[np.bool_] = distinct[places] == hashes
    seen[places[hits]] = True
    return hits


def _scramble(numbers: Sequence[int]) -> Words:
    """Turn small numbers into well-mixed ones (the finalizer of SplitMix64)."""
    mixed = np.asarray(numbers, dtype=np.uint64) * _BASE
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
