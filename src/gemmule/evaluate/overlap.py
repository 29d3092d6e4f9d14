"""What a text has in common with the training data: spans of words, found by their hashes in one pass.

Words are compared in lower case and without punctuation. Memory grows with the text, not with the training data.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemmule.data.corpus import Corpus
from gemmule.tokenizer import Tokenizer

SPAN = 13  # words of the spans that count as overlap, as for GPT-3
NGRAM = 8  # words of the spans that are counted where a share is given
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

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._hashes: list[Words] = []

    def add(self, text: str) -> None:
        """Add a document; all are added before the search."""
        self._hashes.append(_hashes(self._vocabulary.add(text), SPAN))

    def search(self, words: Words) -> None:
        """Mark the spans that occur among words of the training data."""
        _mark(self._seen, self._sought[0], _hashes(words, SPAN))

    def overlapping(self) -> npt.NDArray[np.bool_]:
        """Return for each document whether a span of it was found."""
        ends = np.cumsum([len(hashes) for hashes in self._hashes])
        found = self._seen[self._sought[1]]
        return np.array([bool(part.any()) for part in np.split(found, ends)[: len(self._hashes)]], dtype=bool)

    @cached_property
    def _sought(self) -> tuple[Words, npt.NDArray[np.int64]]:
        """The distinct hashes, sorted, and the index of each span's hash among them."""
        return np.unique(np.concatenate([np.zeros(0, np.uint64), *self._hashes]), return_inverse=True)

    @cached_property
    def _seen(self) -> npt.NDArray[np.bool_]:
        return np.zeros(len(self._sought[0]), dtype=bool)


class Copied(NamedTuple):
    """How much of a text occurs in the training data."""

    ngrams: int  # the text's spans of 8 words
    copied_ngrams: int  # those that occur there
    longest: int  # words of the longest span that occurs there, 0 for below 5
    start: int  # index of that span's first word


class CopiedSpans:
    """All spans of texts from 5 words on, to be looked for in the training data."""

    def __init__(self, texts: Sequence[str], vocabulary: Vocabulary) -> None:
        self._texts = [vocabulary.add(text) for text in texts]
        self._levels = list(_levels(self._texts))

    def search(self, words: Words) -> None:
        """Mark the spans that occur among words of the training data."""
        places = np.arange(max(0, len(words) - SHORTEST + 1))
        hashes = _hashes(words, SHORTEST)
        for length, level in enumerate(self._levels, start=SHORTEST):
            kept = _mark(level.seen, level.distinct, hashes)
            kept &= places + length < len(words)
            places, hashes = places[kept], hashes[kept]
            if not len(places):
                break
            hashes = hashes * _BASE + words[places + length]

    def found(self) -> list[Copied]:
        """Return for each text what of it was found."""
        ngrams = [max(0, len(words) - NGRAM + 1) for words in self._texts]
        copied, longest, start = ([0] * len(self._texts) for _ in range(3))
        for length, level in enumerate(self._levels, start=SHORTEST):
            found = np.flatnonzero(level.seen[level.places])
            owners, first, counts = np.unique(level.owners[found], return_index=True, return_counts=True)
            starts = found[first] - np.searchsorted(level.owners, owners)
            for number, at, hits in zip(owners.tolist(), starts.tolist(), counts.tolist(), strict=True):
                longest[number], start[number] = length, at
                if length == NGRAM:
                    copied[number] = hits
        return [Copied(*each) for each in zip(ngrams, copied, longest, start, strict=True)]


def search(training: Iterable[Sequence[str]], vocabulary: Vocabulary, *sought: Spans | CopiedSpans) -> None:
    """Look for spans, whose words are those of the vocabulary, in the training texts; one pass over their portions."""
    for texts in training:
        words = vocabulary.known(texts)
        for spans in sought:
            spans.search(words)


def copied_spans(texts: Sequence[str], training: Iterable[Sequence[str]]) -> list[Copied]:
    """Return for each text how much of it occurs in the training texts, which come in portions."""
    vocabulary = Vocabulary()
    spans = CopiedSpans(texts, vocabulary)
    search(training, vocabulary, spans)
    return spans.found()


class _Level(NamedTuple):
    """All spans of one length."""

    distinct: Words  # their hashes, sorted
    seen: npt.NDArray[np.bool_]  # which of those were found
    places: npt.NDArray[np.int64]  # index of each span's hash
    owners: npt.NDArray[np.int64]  # text of each span


def _levels(texts: Sequence[Words]) -> Iterator[_Level]:
    """Yield the spans of each length from 5 on."""
    hashes = [_hashes(words, SHORTEST) for words in texts]
    for length in count(SHORTEST):
        if not any(map(len, hashes)):
            return
        distinct, places = np.unique(np.concatenate(hashes), return_inverse=True)
        owners = np.repeat(np.arange(len(texts)), [len(part) for part in hashes])
        yield _Level(distinct, np.zeros(len(distinct), dtype=bool), places, owners)
        hashes = [own[:-1] * _BASE + words[length:] for own, words in zip(hashes, texts, strict=True)]


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
