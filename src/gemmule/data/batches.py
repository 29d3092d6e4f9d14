"""Rows of tokens for training and validation, cut from a corpus; which row holds what is pure arithmetic."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemmule.data.corpus import Corpus, check_corpus

IGNORED = -100  # a target that is not trained; what cross_entropy ignores by default
PADDING = -1  # the document of padding, which sees itself alone


class Batch(NamedTuple):
    """Rows of tokens and, one place later, what they should predict."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64; IGNORED where nothing is predicted
    documents: Tensor | None  # (B, T) int32, equal within a document of a row; None where documents see each other

    @property
    def trained(self) -> int:
        """The number of targets that count."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device."""
        if device.type == "cuda":  # from pinned memory, so that nobody waits for what the device still has to do
            return self._each(lambda part: part.pin_memory().to(device, non_blocking=True))
        return self._each(lambda part: part.to(device))

    def split(self, rows: int) -> "Iterator[Batch]":
        """Yield the batch in portions of at most so many rows."""
        for first in range(0, len(self.tokens), rows):
            yield self._each(itemgetter(slice(first, first + rows)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        documents = None if self.documents is None else change(self.documents)
        return Batch(change(self.tokens), change(self.targets), documents)


class Epoch(NamedTuple):
    """One pass over a corpus."""

    order: npt.NDArray[np.int64]  # the documents as they come
    ends: npt.NDArray[np.int64]  # where each of them ends among the epoch's tokens


class PackedRows:
    """An endless stream of documents, reshuffled each epoch, cut into rows of `context` tokens.

    Row r holds the stream's tokens r T to r T + T, the first T as inputs and the last T as targets, so every token is a
    target once. A document's first token is IGNORED where nothing before it can predict it: where it is `bos_id`, and
    where documents are masked.
    """

    def __init__(
        self, corpus: Corpus, context: int, seed: int, mask_documents: bool = False, bos_id: int | None = None
    ) -> None:
        check_corpus(corpus, context)
        self.corpus = corpus
        self.context = context
        self.seed = seed
        self.mask_documents = mask_documents
        self.bos_id = bos_id
        self.epoch = lru_cache(maxsize=2)(self._shuffle)  # a batch may reach into the next epoch

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`; a pure function of them and the seed."""
        length = count * self.context + 1
        stream = np.empty(length, dtype=np.int64)
        segment = np.empty(length, dtype=np.int32)
        filled = 0
        for number, (document, start, stop) in enumerate(self._spans(first * self.context, length)):
            there = slice(filled, filled + stop - start)
            stream[there] = self.corpus.read(document, start, stop)
            segment[there] = number
            filled = there.stop
        shape = (count, self.context)
        begins = segment[1:] != segment[:-1]
        unpredictable = begins & (self.mask_documents | (stream[1:] == self.bos_id))
        targets = np.where(unpredictable, IGNORED, stream[1:]).reshape(shape)
        documents = torch.from_numpy(segment[:-1].reshape(shape)) if self.mask_documents else None
        return Batch(torch.from_numpy(stream[:-1].reshape(shape)), torch.from_numpy(targets), documents)

    def _spans(self, position: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (document, start, stop) for `length` tokens of the stream from `position` on."""
        number, within = divmod(position, self.corpus.tokens)
        while length:
            epoch = self.epoch(number)
            place = int(np.searchsorted(epoch.ends, within, side="right"))
            while length and place < len(epoch.order):
                document = int(epoch.order[place])
                size = int(self.corpus.lengths[document])
                start = within - (int(epoch.ends[place]) - size)
                stop = min(size, start + length)
                yield document, start, stop
                length -= stop - start
                within += stop - start
                place += 1
            number, within = number + 1, 0

    def _shuffle(self, number: int) -> Epoch:
        # Raw bits of a bit generator: numpy promises that no version changes them, which it does not of `permutation`.
        keys = np.random.PCG64(np.random.SeedSequence([self.seed, number])).random_raw(self.corpus.documents)
        order = np.argsort(keys, kind="stable")
        return Epoch(order, np.cumsum(self.corpus.lengths[order], dtype=np.int64))


_PATTERN = 4096  # rows after which a mixture repeats which source they are of


class MixedRows:
    """An endless stream of rows from several corpora, each with a fixed share of the rows, spread evenly.

    Which source a row is of repeats after 4,096 rows, so shares are exact to one of these. A source's rows are those of
    its own `PackedRows`, one after the other.
    """

    def __init__(self, sources: Sequence[PackedRows], weights: Sequence[float]) -> None:
        self.sources = tuple(sources)
        counts = _share_out(_PATTERN, weights)
        places = [(np.arange(count) + 0.5) / count for count in counts]
        owners = np.repeat(np.arange(len(counts)), counts)
        self._pattern = owners[np.argsort(np.concatenate(places), kind="stable")]
        one_hot = self._pattern[:, None] == np.arange(len(counts))
        self._before = np.concatenate([np.zeros((1, len(counts)), np.int64), np.cumsum(one_hot, axis=0)])

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`; a pure function of them and the seed."""
        owners = torch.from_numpy(self._pattern[np.arange(first, first + count) % _PATTERN])
        order, parts = [], []
        for number, (start, stop) in enumerate(
            zip(self._rows_before(first), self._rows_before(first + count), strict=True)
        ):
            if stop > start:
                parts.append(self.sources[number].rows(int(start), int(stop - start)))
                order.append(torch.nonzero(owners == number)[:, 0])
        back = torch.argsort(torch.cat(order))
        documents = [part.documents for part in parts if part.documents is not None]
        return Batch(
            torch.cat([part.tokens for part in parts])[back],
            torch.cat([part.targets for part in parts])[back],
            torch.cat(documents)[back] if documents else None,
        )

    def _rows_before(self, row: int) -> npt.NDArray[np.int64]:
        """Return how many of the rows before this one are of each source."""
        rounds, within = divmod(row, _PATTERN)
        before: npt.NDArray[np.int64] = rounds * self._before[-1] + self._before[within]
        return before


def _share_out(whole: int, weights: Sequence[float]) -> list[int]:
    """Divide a number in proportion to weights: at least 1 for each, the largest remainders rounded up."""
    exact = [whole * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: max(0, whole - sum(counts))]:
        counts[number] += 1
    counts[counts.index(max(counts))] -= sum(counts) - whole
    return counts


class Piece(NamedTuple):
    """Tokens start to stop of a document as inputs; their targets are one place later."""

    document: int
    start: int
    stop: int


class WholeDocuments:
    """A fixed set of documents for validation, packed whole into rows; each sees itself alone.

    Taken from the start of the corpus until `limit_tokens` targets are reached. Every token but a document's first is a
    target exactly once; documents longer than a row are cut into pieces, the later ones without what came before.
    """

    def __init__(
        self, corpus: Corpus, context: int, batch_size: int, pad_id: int | None, limit_tokens: int | None = None
    ) -> None:
        self._corpus, self._context, self._batch_size, self._pad_id = corpus, context, batch_size, pad_id or 0
        targets = np.cumsum(corpus.lengths, dtype=np.int64) - np.arange(1, corpus.documents + 1)
        enough = corpus.documents if limit_tokens is None else int(np.searchsorted(targets, limit_tokens)) + 1
        self.documents = min(enough, corpus.documents)
        self.targets = int(targets[self.documents - 1])
        self.bytes = sum(corpus.text_bytes(document) for document in range(self.documents))
        self._rows = _pack(corpus, self.documents, context)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._rows), self._batch_size):
            yield self._batch(self._rows[first : first + self._batch_size])

    def _batch(self, rows: list[list[Piece]]) -> Batch:
        shape = (len(rows), self._context)
        tokens = np.full(shape, self._pad_id, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        documents = np.full(shape, PADDING, dtype=np.int32)
        for row, pieces in enumerate(rows):
            filled = 0
            for number, piece in enumerate(pieces):
                ids = self._corpus.read(piece.document, piece.start, piece.stop + 1)
                there = slice(filled, filled + len(ids) - 1)
                tokens[row, there] = ids[:-1]
                targets[row, there] = ids[1:]
                documents[row, there] = number
                filled = there.stop
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(documents))


def _pack(corpus: Corpus, documents: int, context: int) -> list[list[Piece]]:
    """Put each piece into the row that it fills best, or into a new one."""
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (free places, row), ascending
    for document in range(documents):
        inputs = int(corpus.lengths[document]) - 1
        for start in range(0, inputs, context):
            piece = Piece(document, start, min(start + context, inputs))
            size = piece.stop - piece.start
            best = bisect_left(room, (size, 0))
            if best == len(room):
                rows.append([])
                free, row = context, len(rows) - 1
            else:
                free, row = room.pop(best)
            rows[row].append(piece)
            if free > size:
                insort(room, (free - size, row))
    return rows
