"""Ways to go on from a prompt token by token; all give the logits that the model gives, at different speed.

plain     the model as it is, with a cache that grows: the slow twin, on any device and for any number of rows
native    the model's step in C on the CPU (`native.py`), for few rows
compiled  the model in shapes that never change, through torch.compile; on GPUs replayed as a CUDA graph
"""

from functools import cache, partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from gemmule.errors import DeviceError
from gemmule.generate import native
from gemmule.generate.weights import int8_weights
from gemmule.model.attention import Visibility
from gemmule.model.cache import Cache
from gemmule.model.config import Kind
from gemmule.model.gemma3 import Gemma3, last_logits
from gemmule.runtime import reason_not_to_compile, uncompiled

# "auto" is native where that is possible, else plain: what is compiled for half a minute pays for long outputs alone.
Decoding = Literal["auto", "plain", "native", "compiled"]
DECODINGS: tuple[str, ...] = get_args(Decoding)

# The position of a place in a cache that holds nothing: later than every query, so that none sees it.
_FREE = 2**62
# Static caches come in few sizes, so that a compiled step serves many prompts.
_SMALLEST = 256


class Decoder(Protocol):
    """Feeds the next token of every row and remembers it."""

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B,V) after tokens (B,) at positions (B,)."""


def choose_decoding(model: Gemma3, rows: int, wanted: Decoding) -> Decoding:
    """Resolve "auto", and refuse a way that is closed here: DeviceError says why, and what is open."""
    if wanted == "auto":
        return "plain" if native.reason_against(model, rows) else "native"
    reason = None
    if wanted == "native":
        reason = native.reason_against(model, rows)
    elif wanted == "compiled":
        eight = int8_weights(model)
        reason = "the weights are int8" if eight else reason_not_to_compile(model.embedding.weight.device)
    if reason:
        raise DeviceError(f"decoding {wanted!r}: {reason}; use 'plain' or 'auto'")
    return wanted


def decoder_for(model: Gemma3, cache: Cache, rows: int, capacity: int, decoding: Decoding = "auto") -> Decoder:
    """Go on from a prefilled cache to at most `capacity` positions. DeviceError where the way asked for is closed."""
    way = choose_decoding(model, rows, decoding)
    if way == "native":
        return native.NativeDecoder(model, cache, rows, capacity)
    return CompiledDecoder(model, cache, rows, capacity) if way == "compiled" else PlainDecoder(model, cache)


def why_slow(model: Gemma3) -> str | None:
    """Return why "auto" would take the plain way for a model on the CPU, or None."""
    return native.reason_against(model) if model.embedding.weight.device.type == "cpu" else None


def prefill(model: Gemma3, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Feed prompts (B,T) into an empty or filled cache; return the logits after them, (B,V).

    What has a negative position is padding, of a document of its own.
    """
    documents = torch.where(positions < 0, -1, 0).expand(tokens.shape) if bool((positions < 0).any()) else None
    with uncompiled():
        return model(tokens, positions, documents, cache, readout=last_logits)[:, 0]


class PlainDecoder:
    """The model as it is."""

    def __init__(self, model: Gemma3, cache: Cache) -> None:
        self._model, self._cache = model, cache

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B,V) after tokens (B,) at positions (B,)."""
        documents = torch.zeros_like(positions)[:, None] if self._cache.has_documents else None
        with uncompiled():
            return self._model(tokens[:, None], positions[:, None], documents, self._cache, readout=last_logits)[:, 0]


class StaticCache(Cache):
    """A cache whose tensors stay where they are: rings whose places are tagged with the positions they hold."""

    def __init__(self, model: Gemma3, cache: Cache, rows: int, capacity: int) -> None:
        """Take over what a cache holds; a local layer has as many places as its window, a global one `capacity`."""
        super().__init__(model.config)
        self.length = cache.length
        # The place last filled: on the device, where a recorded graph finds it each time it is replayed.
        self._slots: dict[Kind, Tensor] = {}
        self._tags: dict[Kind, Tensor] = {}
        self._rings: list[tuple[Tensor, Tensor]] = []
        for layer, kind in enumerate(self._kinds):
            size = min(self._windows[kind] or capacity, capacity)
            positions, keys, values = cache.kept(layer)
            count = positions.shape[1]
            if count > size:  # cannot be, unless the capacity is too small
                raise ValueError(f"a cache of {size} places for {count} tokens")
            slots = torch.arange(cache.length - count, cache.length, device=positions.device) % size
            if kind not in self._tags:
                tags = torch.full((rows, size), _FREE, device=positions.device)
                tags[:, slots] = torch.where(positions < 0, _FREE, positions).expand(rows, -1)
                self._tags[kind] = tags
                self._slots[kind] = torch.tensor([cache.length - 1], device=positions.device) % size
            ring = (rows, keys.shape[1], size, keys.shape[3])
            pair = keys.new_zeros(ring), values.new_zeros(ring)
            pair[0][:, :, slots], pair[1][:, :, slots] = keys, values
            self._rings.append(pair)

    def extend(self, positions: Tensor, documents: Tensor | None) -> dict[Kind, Visibility]:
        """Announce one token a row, at positions (B,1); return what each will see, per kind."""
        assert documents is None, "padding is not taken over, so nothing is to be told apart"
        visible: dict[Kind, Visibility] = {}
        for kind, tags in self._tags.items():
            tags.index_copy_(1, self._slots[kind].add_(1).remainder_(tags.shape[1]), positions)
            visible[kind] = Visibility(positions, tags, self._windows[kind])
        return visible

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put a token's key and value (B,K,1,H) into a layer's ring; return the ring (B,K,S,H)."""
        keys, values = self._rings[layer]
        slot = self._slots[self._kinds[layer]]
        keys.index_copy_(2, slot, key)
        values.index_copy_(2, slot, value)
        return keys, values


class CompiledDecoder:
    """The model through torch.compile, in shapes that never change; on GPUs recorded as a graph, and replayed."""

    def __init__(self, model: Gemma3, cache: Cache, rows: int, capacity: int) -> None:
        places = max(_SMALLEST, 1 << (capacity - 1).bit_length())
        device = model.embedding.weight.device
        # Where the step finds what it is fed: what is recorded reads, writes and leaves its logits in the same places.
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        arguments = (model, self._tokens, self._positions, StaticCache(model, cache, rows, places))
        self._run = partial(_compiled_step(tuned=rows == 1 and device.type == "cuda"), *arguments)
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B,V) after tokens (B,) at positions (B,), until the next step."""
        self._tokens[:, 0], self._positions[:, 0] = tokens, positions
        if self._recorded is None:
            logits = self._run()
            if logits.is_cuda:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # nothing runs in here
                    self._recorded = graph, self._run()
            return logits
        graph, logits = self._recorded
        graph.replay()
        return logits


def static_step(model: Gemma3, tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
    """Feed one token a row, (B,1); return the logits after it, (B,V). What is compiled."""
    return model(tokens, positions, None, cache, readout=last_logits)[:, 0]


@cache
def _compiled_step(tuned: bool) -> "_Step":
    # Tuned, products with a single row become kernels of the compiler's own, joined with what comes before and after.
    options: dict[str, Any] | None = {"coordinate_descent_tuning": True} if tuned else None
    return torch.compile(static_step, fullgraph=True, dynamic=False, options=options)


class _Step(Protocol):
    def __call__(self, model: Gemma3, tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor: ...
