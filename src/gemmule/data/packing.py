"""Sequence packing: rows of tokens for training and validation, deterministic in (seed, row)."""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gemmule.data.batches import IGNORED, PADDING, Batch, RowStream
from gemmule.data.corpus import Corpus, check_corpus


class Epoch(NamedTuple):
    """One pass over a corpus, shuffled."""

    order: npt.NDArray[np.int64]  # the shuffled documents
    ends: npt.NDArray[np.int64]  # end of each document, in tokens of the epoch


class PackedRows:
    """Packed training rows: an endless document stream, reshuffled per epoch, in rows of sequence length `context`.

    Row r holds tokens r T to r T + T of the stream, the first T as inputs and the last T as targets, so every token is
    a target once. The first token of a document is IGNORED where no context can predict it: where it is `bos_id`, and
    with `mask_documents`.
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
        self.epoch = lru_cache(maxsize=2)(self._shuffle)  # a batch may span two epochs

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`; deterministic, a pure function of (seed, first, count)."""
        length = count * self.context + 1
        stream = np.empty(length, dtype=np.int64)
        segment = np.empty(length, dtype=np.int32)
        filled = 0
        for number, (document, start, stop) in enumerate(self._slices(first * self.context, length)):
            filling = slice(filled, filled + stop - start)
            stream[filling] = self.corpus.read(document, start, stop)
            segment[filling] = number
            filled = filling.stop
        shape = (count, self.context)
        begins = segment[1:] != segment[:-1]
        unpredictable = begins & (self.mask_documents | (stream[1:] == self.bos_id))
        targets = np.where(unpredictable, IGNORED, stream[1:]).reshape(shape)
        documents = torch.from_numpy(segment[:-1].reshape(shape)) if self.mask_documents else None
        return Batch(torch.from_numpy(stream[:-1].reshape(shape)), torch.from_numpy(targets), documents)

    def _slices(self, position: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (document, start, stop) for `length` tokens of the stream from `position`."""
        number, within = divmod(position, self.corpus.tokens)
        while length:
            epoch = self.epoch(number)
            index = int(np.searchsorted(epoch.ends, within, side="right"))
            while length and index < len(epoch.order):
                document = int(epoch.order[index])
                size = int(self.corpus.lengths[document])
                start = within - (int(epoch.ends[index]) - size)
                stop = min(size, start + length)
                yield document, start, stop
                length -= stop - start
                within += stop - start
                index += 1
            number, within = number + 1, 0

    def _shuffle(self, number: int) -> Epoch:
        order = permutation(self.corpus.documents, self.seed, number)
        return Epoch(order, np.cumsum(self.corpus.lengths[order], dtype=np.int64))


T = TypeVar("T")


def best_fit(sizes: Iterable[tuple[T, int]], length: int) -> list[list[T]]:
    """Best-fit packing: put each item with its size into the row with the least sufficient space, or into a new one."""
    rows: list[list[T]] = []
    space: list[tuple[int, int]] = []  # (free positions, row), ascending
    for item, size in sizes:
        best = bisect_left(space, (size, 0))
        if best == len(space):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = space.pop(best)
        rows[row].append(item)
        if free > size:
            insort(space, (free - size, row))
    return rows


def permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the numbers up to `count` in a random order, the same on every machine."""
    # Raw bits: NumPy guarantees the stream of a bit generator across versions, but not that of `permutation`.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


_PERIOD = 4096  # rows after which the order of sources in a mixture repeats


class MixedRows:
    """A weighted mixture of packed rows from several corpora, interleaved evenly.

    The order of sources repeats after 4,096 rows, so weights are exact to one of these. Each source gives the rows of
    its own stream in order.
    """

    def __init__(self, sources: Sequence[RowStream], weights: Sequence[float]) -> None:
        self.sources = tuple(sources)
        counts = _apportion(_PERIOD, weights)
        positions = [(np.arange(count) + 0.5) / count for count in counts]
        owners = np.repeat(np.arange(len(counts)), counts)
        self._pattern = owners[np.argsort(np.concatenate(positions), kind="stable")]
        one_hot = self._pattern[:, None] == np.arange(len(counts))
        self._before = np.concatenate([np.zeros((1, len(counts)), np.int64), np.cumsum(one_hot, axis=0)])

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`; deterministic, a pure function of (seed, first, count)."""
        owners = torch.from_numpy(self._pattern[np.arange(first, first + count) % _PERIOD])
        order, parts = [], []
        for number, (start, stop) in enumerate(
            zip(self._rows_before(first), self._rows_before(first + count), strict=True)
        ):
            if stop > start:
                parts.append(self.sources[number].rows(int(start), int(stop - start)))
                order.append(torch.nonzero(owners == number)[:, 0])
        inverse = torch.argsort(torch.cat(order))
        documents = [part.documents for part in parts if part.documents is not None]
        return Batch(
            torch.cat([part.tokens for part in parts])[inverse],
            torch.cat([part.targets for part in parts])[inverse],
            torch.cat(documents)[inverse] if documents else None,
            {name: torch.cat([part.inputs[name] for part in parts])[inverse] for name in parts[0].inputs},
        )

    def _rows_before(self, row: int) -> npt.NDArray[np.int64]:
        """Return the number of rows of each source before row `row`."""
        periods, within = divmod(row, _PERIOD)
        before: npt.NDArray[np.int64] = periods * self._before[-1] + self._before[within]
        return before


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a number in proportion to weights (largest remainder method), at least 1 each."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: max(0, total - sum(counts))]:
        counts[number] += 1
    counts[counts.index(max(counts))] -= sum(counts) - total
    return counts


class Piece(NamedTuple):
    """Consecutive tokens of a document in a row: inputs `start` to `stop`, of which those from `first` are scored."""

    document: int
    start: int
    first: int
    stop: int


class WholeDocuments:
    """Packed validation batches: whole documents in rows of sequence length `context`, with padding and document masks.

    The documents are the first of the corpus up to `limit_documents`, or `limit_tokens` targets. Every token but
    the first of a document is a target exactly once, as far as the loss mask has it. A document longer than a row
    is read in windows of `context` tokens that move by `stride`: from the second on, a window predicts only what
    the one before did not, so that each target has at least `context` - `stride` tokens of left context. By default
    the stride is the context: documents are cut, and the later pieces are without the earlier context. Rows may be
    longer than the context (`row_length`), so that less of them is padding. Memory: about 60 bytes per document.
    """

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        batch_size: int,
        pad_id: int | None,
        limit_tokens: int | None = None,
        limit_documents: int | None = None,
        stride: int | None = None,
        row_length: int | None = None,
    ) -> None:
        self._corpus, self._batch_size, self._pad_id = corpus, batch_size, pad_id or 0
        self._row_length = row_length or context
        targets = np.cumsum(corpus.count_targets())
        enough = corpus.documents if limit_tokens is None else int(np.searchsorted(targets, limit_tokens)) + 1
        self.documents = min(enough, corpus.documents, limit_documents or corpus.documents)
        self.targets = int(targets[self.documents - 1])
        self.bytes = corpus.first_bytes(self.documents)
        self._pieces, self._ends = _pack(corpus, self.documents, context, stride or context, self._row_length)

    def __len__(self) -> int:
        return -(-len(self._ends) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            yield self._batch(self._rows(number))

    def pieces(self, batch: int) -> list[Piece]:
        """Return the pieces of a batch in the order of its targets, row by row."""
        rows = self._rows(batch)
        first = self._ends[rows.start - 1] if rows.start else 0
        return [Piece(*piece) for piece in self._pieces[first : self._ends[rows.stop - 1]].tolist()]

    def _rows(self, batch: int) -> range:
        return range(len(self._ends))[batch * self._batch_size : (batch + 1) * self._batch_size]

    def _batch(self, rows: range) -> Batch:
        begins = [int(self._ends[which - 1]) if which else 0 for which in rows]
        pieces = [
            [Piece(*piece) for piece in self._pieces[begin : self._ends[which]].tolist()]
            for begin, which in zip(begins, rows, strict=True)
        ]
        return rows_of_pieces(self._corpus, pieces, self._row_length, self._pad_id)


def rows_of_pieces(corpus: Corpus, rows: Sequence[Sequence[Piece]], length: int, pad_id: int) -> Batch:
    """Return rows of pieces, each a document of its own, with their loss masks; padded to a length."""
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    targets = np.full((len(rows), length), IGNORED, dtype=np.int64)
    documents = np.full((len(rows), length), PADDING, dtype=np.int32)
    for row, pieces in enumerate(rows):
        filled = 0
        for number, (document, start, first, stop) in enumerate(pieces):
            ids = corpus.read(document, start, stop + 1).astype(np.int64)
            filling = slice(filled, filled + len(ids) - 1)
            tokens[row, filling] = ids[:-1]
            known = corpus.read_mask(document, first + 1, stop + 1)
            targets[row, filled + first - start : filling.stop] = np.where(known, ids[1 + first - start :], IGNORED)
            documents[row, filling] = number
            filled = filling.stop
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(documents))


_PACKED = 1 << 16  # documents per call of best-fit packing


def _pack(
    corpus: Corpus, documents: int, context: int, stride: int, row_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pack documents into rows; return their pieces (M,4) row by row, and the end of each row among the pieces."""
    pieces, ends = array("q"), array("q")
    for first in range(0, documents, _PACKED):
        for row in _pack_some(corpus, range(first, min(first + _PACKED, documents)), context, stride, row_length):
            pieces.extend(number for piece in row for number in piece)
            ends.append(len(pieces) // len(Piece._fields))
    return np.array(pieces, np.int64).reshape(-1, len(Piece._fields)), np.array(ends, np.int64)


def _pack_some(corpus: Corpus, documents: range, context: int, stride: int, row_length: int) -> list[list[Piece]]:
    """Pack the windows of some documents into rows."""
    windows = (_windows(document, int(corpus.lengths[document]) - 1, context, stride) for document in documents)
    return best_fit(((piece, piece.stop - piece.start) for piece in chain.from_iterable(windows)), row_length)


def _windows(document: int, inputs: int, context: int, stride: int) -> Iterator[Piece]:
    """Yield the windows of a document, which together score each of its inputs once."""
    scored = 0
    while scored < inputs:
        start = max(0, scored - context + stride) if scored else 0
        stop = min(start + context, inputs)
        yield Piece(document, start, scored, stop)
        scored = stop
