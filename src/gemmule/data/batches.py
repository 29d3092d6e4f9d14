"""Batches of token rows, and the stream that they are read from."""

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

IGNORED = -100  # a target without loss; the default ignore_index of cross_entropy
PADDING = -1  # the document id of padding, which attends to itself alone


class Batch(NamedTuple):
    """Token sequences and their targets, the same sequences shifted by one position."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64; IGNORED where there is no loss
    documents: Tensor | None  # (B, T) int32, document ids within a row; None where attention crosses documents
    inputs: Mapping[str, Tensor] = {}  # what the objective needs besides, each (B, ...)

    @property
    def num_targets(self) -> int:
        """Number of targets other than IGNORED."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device; to CUDA asynchronously from pinned memory, for prefetch."""
        if device.type == "cuda":
            return self._each(lambda part: part.pin_memory().to(device, non_blocking=True))
        return self._each(lambda part: part.to(device))

    def split(self, rows: int) -> "Iterator[Batch]":
        """Yield micro-batches of at most `rows` rows."""
        for first in range(0, len(self.tokens), rows):
            yield self._each(itemgetter(slice(first, first + rows)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        documents = None if self.documents is None else change(self.documents)
        inputs = {name: change(value) for name, value in self.inputs.items()}
        return Batch(change(self.tokens), change(self.targets), documents, inputs)


class RowStream(Protocol):
    """An endless stream of training rows, each a pure function of its number, so that a run resumes anywhere."""

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`."""
        ...
