"""Packing of whole conversations, and of pairs of replies, into rows of training."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gemmule.data.batches import Batch
from gemmule.data.corpus import Corpus
from gemmule.data.packing import Piece, best_fit, permutation, rows_of_pieces
from gemmule.errors import DatasetError

_PACKING = 2**32  # the order in which groups are packed has a number that no epoch reaches


class PackedConversations:
    """Training rows of whole conversations, each of which attends to itself alone, with the loss mask in the targets.

    All documents are packed once, best-fit, in rows of `context` tokens; each epoch has the same rows in another order.
    What comes after the last trained token of a document is not read. `group` documents in a row stay together, such as
    the chosen and the rejected reply of a pair, and are numbered within a row in their order. A group that is longer
    than a row is left out, and counted as `too_long`; with `drop_turns` a conversation loses its last turns instead, so
    that none is cut in a reply and each reply that is left has all of its context.
    """

    def __init__(
        self, corpus: Corpus, context: int, seed: int, pad_id: int | None, group: int = 1, drop_turns: bool = False
    ) -> None:
        self.corpus, self.context, self.seed, self._pad_id = corpus, context, seed, pad_id or 0
        self._stops, lost = corpus.count_read_tokens(context + 1, drop_turns and group == 1)
        sizes = np.where(self._stops > 0, self._stops - 1, context + 1).reshape(-1, group).sum(axis=1)
        fits = sizes <= context
        if not fits.any():
            every, _ = corpus.count_read_tokens(1 << 40, drop_turns=False)
            shortest = int((every - 1).reshape(-1, group).sum(axis=1).min())
            also = "" if drop_turns or group > 1 else ', or set data.too_long = "drop_turns"'
            raise DatasetError(
                f"train.context = {context}: none of the {len(sizes):,} conversations fits; the shortest needs "
                f"{shortest:,}{also}"
            )
        self._packed = _pack_groups(sizes, context, group, seed)
        self.order = lru_cache(maxsize=2)(self._shuffle)
        self.kept, self.too_long = int(fits.sum()), int((~fits).sum())
        self.shortened, self.dropped_replies = int((lost > 0).sum()), int(lost.sum())
        self.filled = int(sizes[fits].sum()) / (context * len(self._packed))  # share of the positions without padding

    @property
    def rows_per_epoch(self) -> int:
        """How many rows hold all conversations."""
        return len(self._packed)

    @property
    def most_documents(self) -> int:
        """The largest number of documents in a row."""
        return max(map(len, self._packed))

    def documents(self, row: int) -> list[int]:
        """Return the documents of row `row` of the stream, in their order."""
        epoch, within = divmod(row, len(self._packed))
        return self._packed[int(self.order(epoch)[within])]

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`; deterministic, a pure function of (seed, first, count)."""
        members = (self.documents(row) for row in range(first, first + count))
        pieces = [[Piece(number, 0, 0, int(self._stops[number]) - 1) for number in row] for row in members]
        return rows_of_pieces(self.corpus, pieces, self.context, self._pad_id)

    def describe(self) -> str:
        """Describe how the conversations fill rows, and which do not."""
        text = f"{self.kept:,} conversations in {self.rows_per_epoch:,} rows of {self.context} tokens, "
        text += f"{self.filled:.1%} full"
        if self.too_long:
            text += f"; {self.too_long:,} longer than train.context = {self.context} left out"
        if self.shortened:
            text += f"; {self.shortened:,} without their last turns ({self.dropped_replies:,} replies left out)"
        return text

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        return permutation(len(self._packed), self.seed, epoch)


def _pack_groups(sizes: npt.NDArray[np.int64], context: int, group: int, seed: int) -> list[list[int]]:
    """Pack groups of documents best-fit into rows, those that fit; return the documents of each row.

    Groups are taken in an order that the seed decides, so that rows do not follow the order of the sources.
    """
    order = permutation(len(sizes), seed, _PACKING).tolist()
    rows = best_fit(((number, int(sizes[number])) for number in order if sizes[number] <= context), context)
    return [[number * group + member for number in row for member in range(group)] for row in rows]
