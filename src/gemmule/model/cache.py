"""The KV cache: keys and values of the tokens of each row, tagged with their positions."""

import torch
from torch import Tensor

from gemmule.model.attention import AttentionMask
from gemmule.model.config import Gemma3Config, Kind

# The position of an empty slot: later than every query, so that the attention mask hides it.
EMPTY = 2**62


class Cache:
    """Keys and values per layer: everything for global layers, the last window - 1 tokens for local ones.

    A chunk of any length may follow; its queries attend to what is kept and to the chunk itself, so the logits do not
    depend on how a text is cut into chunks.
    """

    def __init__(self, config: Gemma3Config) -> None:
        self.length = 0
        # The position that follows in each row, (B or 1,).
        self.next_positions = torch.zeros(1, dtype=torch.long)
        self._kinds = config.layer_kinds
        self._windows: dict[Kind, int | None] = {kind: config.window(kind) for kind in ("local", "global")}
        self._positions: dict[Kind, Tensor] = {}
        self._documents: dict[Kind, Tensor] = {}
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers

    def extend(self, positions: Tensor, documents: Tensor | None) -> dict[Kind, AttentionMask]:
        """Announce a chunk, positions (B or 1, T) and documents (B, T); return its attention masks."""
        self.length += positions.shape[-1]
        self.next_positions = positions[:, -1] + 1
        masks: dict[Kind, AttentionMask] = {}
        for kind, window in self._windows.items():
            key_positions = _append(self._positions.get(kind), positions)
            self._positions[kind] = _last(key_positions, window, dim=1)
            key_documents = None
            if documents is not None:
                key_documents = _append(self._documents.get(kind), documents)
                self._documents[kind] = _last(key_documents, window, dim=1)
            masks[kind] = AttentionMask(positions, key_positions, window, documents, key_documents)
        return masks

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a chunk's keys and values (B,K,T,H) to a layer; return those that it may attend to (B,K,S,H)."""
        kept = self._layers[layer]
        if kept is not None:
            key, value = torch.cat((kept[0], key), dim=2), torch.cat((kept[1], value), dim=2)
        window = self._windows[self._kinds[layer]]
        self._layers[layer] = (_last(key, window, dim=2), _last(value, window, dim=2))
        return key, value


def _append(kept: Tensor | None, new: Tensor) -> Tensor:
    return new if kept is None else torch.cat((kept, new), dim=1)


def _last(tensor: Tensor, window: int | None, dim: int) -> Tensor:
    """Keep what the next token can still attend to: the last window - 1 entries."""
    size = tensor.shape[dim]
    if window is None or size < window:
        return tensor
    # A copy, so that the memory of what has left the window is given back.
    return tensor.narrow(dim, size - (window - 1), window - 1).clone()
