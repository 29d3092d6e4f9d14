"""A corpus: tokenized documents, numbered from 0, in one or several shards."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from gemmule.data.shards import Shard, ShardWriter, Tokens, open_shard
from gemmule.errors import DatasetError

_LARGEST_SHARD = 1 << 28  # bytes of tokens


class Corpus:
    """Tokenized documents 0 to N - 1, memory-mapped; memory: 4 bytes per document."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.documents = sum(shard.header.documents for shard in shards)
        self.tokens = sum(shard.header.tokens for shard in shards)
        self.bytes = sum(shard.header.text_bytes for shard in shards)
        self._first = np.cumsum([0, *(shard.header.documents for shard in shards)])  # document of each shard
        self.lengths: npt.NDArray[np.int32] = np.concatenate(
            [np.diff(shard.ends, prepend=0).astype(np.int32) for shard in shards]
        )

    def read(self, document: int, start: int, stop: int) -> Tokens:
        """Return tokens start to stop of a document, memory-mapped."""
        shard, index = self._locate(document)
        begin = int(shard.ends[index - 1]) if index else 0
        return shard.tokens[begin + start : min(begin + stop, int(shard.ends[index]))]

    def read_mask(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return whether tokens start to stop of a document are trained on (the loss mask)."""
        shard, index = self._locate(document)
        begin = int(shard.ends[index - 1]) if index else 0
        return shard.read_mask(begin + start, min(begin + stop, int(shard.ends[index])))

    def count_targets(self) -> npt.NDArray[np.int64]:
        """Count the targets of each document: the tokens after its first that are trained on."""
        if all(shard.mask is None for shard in self.shards):
            return self.lengths.astype(np.int64) - 1
        counts = []
        for shard in self.shards:
            mask = shard.read_mask(0, shard.header.tokens).astype(np.int64)
            counts.append(np.add.reduceat(mask, shard.starts) - mask[shard.starts])
        return np.concatenate(counts)

    def count_read_tokens(self, longest: int, drop_turns: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return how many tokens of each document are read, up to its last trained one, and how many replies it loses.

        Of a document that is longer than `longest` so far, none are; with `drop_turns` those up to the end of the last
        reply that fits.
        """
        stops, lost = [], []
        for shard in self.shards:
            starts, ends, replies = shard.starts, np.asarray(shard.ends, dtype=np.int64), shard.reply_ends()
            before, after = np.searchsorted(replies, starts), np.searchsorted(replies, ends)
            fitting = np.searchsorted(replies, np.minimum(ends, starts + longest))
            last = fitting if drop_turns else np.where(fitting == after, after, before)
            there = last > before
            stops.append(np.where(there, np.append(replies, 0)[last - 1] + 1 - starts, 0))
            lost.append(np.where(there, after - last, 0))
        return np.concatenate(stops), np.concatenate(lost)

    def text_bytes(self, document: int) -> int:
        """Return the UTF-8 bytes of a document's tokens after its first."""
        shard, index = self._locate(document)
        return int(shard.text_bytes[index])

    def first_bytes(self, documents: int) -> int:
        """Return the sum of `text_bytes` over the first `documents` documents."""
        sums, left = 0, documents
        for shard in self.shards:
            sums += int(shard.text_bytes[:left].sum())
            left -= min(left, shard.header.documents)
        return sums

    def _locate(self, document: int) -> tuple[Shard, int]:
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        which = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.shards[which], document - int(self._first[which])


class CorpusWriter:
    """Writes documents to shards PREFIX-00000.tokens, PREFIX-00001.tokens ...; use it in a `with` block."""

    def __init__(
        self,
        folder: Path,
        prefix: str,
        fingerprint: str,
        vocab_size: int,
        largest: int = _LARGEST_SHARD,
        masked: bool = False,
    ) -> None:
        self._folder, self._prefix, self._largest, self._masked = folder, prefix, largest, masked
        self._fingerprint, self._vocab_size = fingerprint, vocab_size
        self._shard: ShardWriter | None = None
        self.names: list[str] = []
        self.tokens = 0

    def append(self, ids: Sequence[int], text_bytes: int, trained: Sequence[bool] | None = None) -> None:
        """Append one document: its tokens, the UTF-8 bytes of those after the first, and its loss mask."""
        if self._shard and self._shard.size >= self._largest:
            self._shard.finalize()
            self._shard = None
        if self._shard is None:
            self.names.append(f"{self._prefix}-{len(self.names):05d}.tokens")
            self._shard = ShardWriter(self._folder / self.names[-1], self._fingerprint, self._vocab_size, self._masked)
        self._shard.append(ids, text_bytes, trained)
        self.tokens += len(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard:
            (self._shard.finalize if kind is None else self._shard.close)()


def open_corpus(folder: Path, names: Sequence[str], fingerprint: str) -> Corpus:
    """Open the named shards of a folder as one corpus; raises DatasetError where one is damaged."""
    return Corpus([open_shard(folder / name, fingerprint) for name in names])


def check_corpus(corpus: Corpus, context: int) -> None:
    """Raise DatasetError where the corpus is shorter than one row: `context` tokens and the last target."""
    if corpus.tokens <= context:
        raise DatasetError(
            f"train.context = {context}: the corpus has {corpus.tokens} tokens in all, fewer than the {context + 1} "
            f"of one row; use more text or train.context = {max(1, corpus.tokens - 1)} or less"
        )
