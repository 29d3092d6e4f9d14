"""The KV cache of generation: rows of different lengths, which join and leave between steps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gemmule.model.cache import Cache
from gemmule.model.config import Kind

# The position of an empty slot: later than every query, so that the attention mask hides it.
EMPTY = 2**62


class BatchCache(Cache):
    """A KV cache with `insert` and `evict` of rows, which are aligned at their newest token."""

    def insert(self, other: "BatchCache") -> None:
        """Append the rows of another cache of the same model, which must not be used afterwards.

        Left padding becomes empty slots in both. ValueError where a row holds several documents.
        """
        for cache in (self, other):
            cache._separate_rows()
        for kind, positions in other._positions.items():
            self._positions[kind] = _stack(self._positions.get(kind), positions, dim=1, filling=EMPTY)
        for layer, new in enumerate(other._layers):
            if new is not None:
                old = self._layers[layer] or (None, None)
                key, value = (_stack(*pair, dim=2, filling=0) for pair in zip(old, new, strict=True))
                self._layers[layer] = key, value
        present = [self.next_positions] if self.length else []
        self.next_positions = torch.cat((*present, other.next_positions))
        self.length = max(self.length, other.length)

    def evict(self, rows: Sequence[int]) -> None:
        """Remove rows; those after them move up. Slots that are then empty in every row are freed."""
        self._separate_rows()
        if not self._positions:
            return
        others = [row for row in range(len(self.next_positions)) if row not in rows]
        kept = torch.tensor(others, dtype=torch.long, device=self.next_positions.device)
        self.next_positions = self.next_positions[kept]
        first: dict[Kind, int] = {}
        for kind, positions in self._positions.items():
            positions = positions[kept]
            empty = (positions == EMPTY).all(dim=0)
            first[kind] = int(empty.sum())  # rows are aligned at their newest token, so these are the first ones
            self._positions[kind] = positions[:, first[kind] :]
        for layer, held in enumerate(self._layers):
            if held is not None:
                start = first[self._kinds[layer]]
                self._layers[layer] = held[0][kept, :, start:], held[1][kept, :, start:]
        self.length = self._positions["global"].shape[1]

    def repeat(self, counts: Sequence[int]) -> None:
        """Repeat each row so many times, for several continuations of one prompt."""
        self._separate_rows()
        index = torch.repeat_interleave(torch.tensor(counts, dtype=torch.long, device=self.next_positions.device))
        self.next_positions = self.next_positions[index]
        for kind, positions in self._positions.items():
            self._positions[kind] = positions[index]
        for layer, held in enumerate(self._layers):
            if held is not None:
                self._layers[layer] = held[0][index], held[1][index]

    def rows(self, layer: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return what a layer holds of each row without padding: positions (S,), keys and values (K,S,H)."""
        held = self._layers[layer]
        assert held is not None, "the cache is empty"
        key, value = held
        positions = self._positions[self._kinds[layer]].expand(len(key), -1)
        counts = ((positions >= 0) & (positions < EMPTY)).sum(dim=1).tolist()  # the last ones: padding is on the left
        starts = [positions.shape[1] - count for count in counts]
        return [(positions[row, at:], key[row, :, at:], value[row, :, at:]) for row, at in enumerate(starts)]

    def _separate_rows(self) -> None:
        """Give each row positions of its own, and turn left padding into empty slots."""
        held = next((held for held in self._layers if held is not None), None)
        if held is None:
            return
        if any(bool((documents > 0).any()) for documents in self._documents.values()):
            raise ValueError("a cache of rows with several documents")
        self._documents.clear()
        count = len(held[0])
        self.next_positions = self.next_positions.expand(count)
        for kind, positions in self._positions.items():
            self._positions[kind] = torch.where(positions < 0, EMPTY, positions).expand(count, -1)


def _stack(old: Tensor | None, new: Tensor, dim: int, filling: int) -> Tensor:
    """Join rows, (B,...) and (B',...) -> (B+B',...), the shorter ones filled on the left of `dim`."""
    if old is None:
        return new
    size = max(old.shape[dim], new.shape[dim])
    behind = [0, 0] * (old.ndim - 1 - dim)
    padded = [functional.pad(each, (*behind, size - each.shape[dim], 0), value=filling) for each in (old, new)]
    return torch.cat(padded)
