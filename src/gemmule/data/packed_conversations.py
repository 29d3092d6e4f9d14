"""Training rows of whole conversations, or pairs of them, packed best-fit; none is cut in the midst of a reply."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gemmule.data.batches import IGNORED, PADDING, Batch
from gemmule.data.corpus import Corpus
from gemmule.data.packing import best_fit, random_order
from gemmule.data.report import counted
from gemmule.errors import DatasetError

Indices = npt.NDArray[np.int64]


class Packing(NamedTuple):
    """How the conversations of a corpus fill rows."""

    kept: int  # conversations, or pairs
    dropped: int  # the same, that are longer than a row
    shortened: int  # conversations without their last turns
    dropped_replies: int  # of the shortened ones
    rows: int
    filled: float  # share of the positions that are no padding

    def describe(self, context: int) -> str:
        """Describe it in a line."""
        text = (
            f"{counted(self.kept, 'conversation')} in {counted(self.rows, 'row')} of {context}, {self.filled:.1%} full"
        )
        if self.dropped:
            text += f"; {self.dropped:,} longer than train.context = {context} left out"
        if self.shortened:
            text += f"; {self.shortened:,} without their last turns (replies left out: {self.dropped_replies:,})"
        return text


class PackedConversations:
    """Packed training rows of sequence length `context`: whole conversations, each of which attends to itself alone.

    They are packed once, best-fit; the order of the rows is shuffled anew each epoch. Targets are the tokens that are
    trained on, and what comes after the last of them in a conversation is left out. A `group` of documents in a row of
    the corpus, such as the two replies of a pair, stays in one row; a row numbers its documents from 0.

    Conversations that are longer than a row are left out, or with `drop_turns` their last turns are, so that each reply
    that is left has all of its context. Raises DatasetError where none fits.
    """

    def __init__(
        self, corpus: Corpus, context: int, seed: int, pad_id: int | None, group: int = 1, drop_turns: bool = False
    ) -> None:
        self.corpus, self.context, self.seed, self._pad_id = corpus, context, seed, pad_id or 0
        self._stops, replies = _stops(corpus, context, drop_turns and group == 1)
        sizes = np.maximum(self._stops - 1, 0).reshape(-1, group).sum(axis=1)
        fits = (self._stops.reshape(-1, group) > 0).all(axis=1) & (sizes <= context)
        if not fits.any():
            shortest = int(_stops(corpus, 1 << 40, False)[0].reshape(-1, group).sum(axis=1).min()) - group
            raise DatasetError(
                f"train.context = {context}: every conversation is longer; the shortest needs {shortest}"
                + ("" if drop_turns or group > 1 else ', or set data.too_long = "drop_turns"')
            )
        order = np.flatnonzero(fits)
        order = order[np.argsort(-sizes[order], kind="stable")]  # the longest first, which fills rows best
        packed = best_fit(sizes[order].tolist(), context)
        members = [order[row] for row in packed]
        self._rows = [(row[:, None] * group + np.arange(group)).ravel() for row in members]
        self._epoch = lru_cache(maxsize=2)(self._shuffle)  # a batch may span two epochs
        lost = np.where(fits, replies.reshape(-1, group).sum(axis=1), 0)
        filled = float(sizes[fits].sum()) / (context * len(packed))
        self.packing = Packing(
            len(order), int((~fits).sum()), int((lost > 0).sum()), int(lost.sum()), len(packed), filled
        )

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`; deterministic, a pure function of (seed, first, count)."""
        shape = (count, self.context)
        tokens = np.full(shape, self._pad_id, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        numbers = np.full(shape, PADDING, dtype=np.int32)
        for row in range(count):
            filled = 0
            for number, document in enumerate(self.documents(first + row)):
                stop = int(self._stops[document])
                ids = self.corpus.read(document, 0, stop).astype(np.int64)
                filling = slice(filled, filled + stop - 1)
                tokens[row, filling] = ids[:-1]
                targets[row, filling] = np.where(self.corpus.read_mask(document, 1, stop), ids[1:], IGNORED)
                numbers[row, filling] = number
                filled = filling.stop
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(numbers))

    def documents(self, row: int) -> list[int]:
        """Return the documents of a row, in the order of their numbers in it."""
        epoch, within = divmod(row, len(self._rows))
        documents: list[int] = self._rows[int(self._epoch(epoch)[within])].tolist()
        return documents

    def _shuffle(self, epoch: int) -> Indices:
        return random_order(len(self._rows), self.seed, epoch)


def _stops(corpus: Corpus, context: int, drop_turns: bool) -> tuple[Indices, Indices]:
    """Return how many tokens of each document are read, 0 where it is left out, and how many replies it loses.

    A document is read up to its last trained token; with `drop_turns` up to the end of the last reply that fits.
    """
    stops, lost = [], []
    for shard in corpus.shards:
        mask = shard.read_mask(0, shard.header.tokens)
        ends = np.asarray(shard.ends, dtype=np.int64)
        starts = np.append(0, ends[:-1])
        replies = np.flatnonzero(mask & ~np.append(mask[1:], False))  # the last token of each
        before, all_of_them = np.searchsorted(replies, starts), np.searchsorted(replies, ends)
        fitting = np.searchsorted(replies, np.minimum(ends, starts + context + 1))
        last = fitting if drop_turns else np.where(fitting == all_of_them, all_of_them, before)
        there = last > before
        stops.append(np.where(there, np.append(replies, 0)[last - 1] + 1 - starts, 0))
        lost.append(np.where(there, all_of_them - last, 0))
    return np.concatenate(stops), np.concatenate(lost)
