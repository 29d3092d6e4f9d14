"""Prefill and decode: prompts into the KV cache in chunks, then one token per row and step.

Three decoders give the logits of the model, at different speed:

plain     the model itself, with a KV cache that grows: the reference, on any device and for any number of rows
native    the decoding step in C on the CPU (`native/`), for few rows
compiled  the model with static shapes through torch.compile; on GPUs a CUDA graph
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from gemmule.compiler import compile_function, reason_not_to_compile, uncompiled
from gemmule.errors import DeviceError
from gemmule.inference.kv_cache import EMPTY, BatchCache
from gemmule.inference.modifications import find_modification
from gemmule.inference.native import decoder as native
from gemmule.inference.quantize import int8_weights
from gemmule.model.attention import AttentionMask
from gemmule.model.cache import Cache
from gemmule.model.config import Kind
from gemmule.model.gemma3 import Gemma3, OutputHead, last_logits

# "auto" is native where that is available, else plain: half a minute of compilation pays off for long outputs alone.
Decoding = Literal["auto", "plain", "native", "compiled"]
DECODINGS: tuple[str, ...] = get_args(Decoding)

# Tokens of all prompts together per prefill chunk: its attention mask has so many rows, and a column for each token
# before. GPUs need more to be busy.
PREFILL_CHUNK_CPU, PREFILL_CHUNK_GPU = 512, 2048
# Static caches are powers of two from here, so that one compiled step serves many prompts.
_MIN_STATIC = 256


class Decoder(Protocol):
    """Decodes one token per row with a KV cache, which rows join and leave between steps."""

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B,V) after tokens (B,) at positions (B,), the next position of each row."""

    def insert(self, cache: BatchCache) -> None:
        """Append the rows of a prefilled cache, which must not be used afterwards."""

    def evict(self, rows: Sequence[int]) -> None:
        """Remove rows; those after them move up."""


def choose_decoding(model: Gemma3, rows: int, wanted: Decoding) -> Decoding:
    """Resolve "auto"; DeviceError where the requested decoding is unavailable, with the reason and alternatives."""
    if wanted == "auto":
        return "plain" if native.unavailable_reason(model, rows) else "native"
    reason = None
    if wanted == "native":
        reason = native.unavailable_reason(model, rows)
    elif wanted == "compiled":
        reason = find_modification(model) or ("the weights are int8" if int8_weights(model) else None)
        reason = reason or reason_not_to_compile(model.embedding.weight.device)
    if reason:
        raise DeviceError(f"decoding {wanted!r}: {reason}; use 'plain' or 'auto'")
    return wanted


def make_decoder(model: Gemma3, rows: int, capacity: int, decoding: Decoding = "auto") -> Decoder:
    """Return a decoder for at most `rows` rows of at most `capacity` positions; errors as in `choose_decoding`."""
    decoding = choose_decoding(model, rows, decoding)
    if decoding == "native":
        return native.NativeDecoder(model, capacity)
    return CompiledDecoder(model, rows, capacity) if decoding == "compiled" else PlainDecoder(model)


def slow_decoding_reason(model: Gemma3) -> str | None:
    """Return why "auto" would decode a model on the CPU without the native step, or None."""
    return native.unavailable_reason(model) if model.embedding.weight.device.type == "cpu" else None


def prefill(model: Gemma3, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Prefill prompts (B,T) into an empty or filled KV cache, in chunks; return the logits after them, (B,V).

    Left padding has negative positions, and is a document of its own. Memory grows with T, not with its square.
    """
    documents = torch.where(positions < 0, -1, 0).expand(tokens.shape) if bool((positions < 0).any()) else None
    rows, length = tokens.shape
    size = max(1, (PREFILL_CHUNK_CPU if tokens.device.type == "cpu" else PREFILL_CHUNK_GPU) // rows)

    def forward(chunk: slice, output_head: OutputHead) -> Tensor:
        marks = None if documents is None else documents[:, chunk]
        with uncompiled():
            return model(tokens[:, chunk], positions[:, chunk], marks, cache, output_head=output_head)

    final = (length - 1) // size * size
    for first in range(0, final, size):
        forward(slice(first, first + size), _no_logits)
    return forward(slice(final, length), last_logits)[:, 0]


def _no_logits(hidden: Tensor, _vocabulary: Tensor) -> Tensor:
    """Skip the output head: the token after a chunk within a prompt is known."""
    return hidden[:, -1:]


class PlainDecoder:
    """The model itself with a KV cache that grows, the reference of the other decoders."""

    def __init__(self, model: Gemma3) -> None:
        self._model, self._cache = model, BatchCache(model.config)
        self.insert, self.evict = self._cache.insert, self._cache.evict

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B,V) after tokens (B,) at positions (B,)."""
        with uncompiled():
            return self._model(tokens[:, None], positions[:, None], None, self._cache, output_head=last_logits)[:, 0]


class StaticCache(Cache):
    """A KV cache of static shapes: ring buffers, position p in slot p modulo size, tagged with their positions.

    Local layers have as many slots as their window, global ones `capacity`. Rows are empty until they are filled.
    """

    def __init__(self, model: Gemma3, rows: int, capacity: int) -> None:
        super().__init__(model.config)
        config, weight = model.config, model.embedding.weight
        self._row_index = torch.arange(rows, device=weight.device)
        self._slots: dict[Kind, Tensor] = {}  # that the next token goes to, (B,)
        self._tags: dict[Kind, Tensor] = {}
        self._rings: list[tuple[Tensor, Tensor]] = []
        for kind in self._kinds:
            size = min(self._windows[kind] or capacity, capacity)
            if kind not in self._tags:
                self._tags[kind] = torch.full((rows, size), EMPTY, dtype=torch.long, device=weight.device)
                self._slots[kind] = torch.zeros_like(self._row_index)
            shape = (rows, config.num_key_value_heads, size, config.head_dim)
            key, value = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
            self._rings.append((key, value))

    def fill(self, rows: Sequence[int], cache: BatchCache) -> None:
        """Replace these rows by those of a cache; ValueError beyond the capacity."""
        for tags in self._tags.values():
            tags[list(rows)] = EMPTY
        for layer, kind in enumerate(self._kinds):
            tags, size = self._tags[kind], self._tags[kind].shape[1]
            for row, (positions, *kept) in zip(rows, cache.rows(layer), strict=True):
                if len(positions) > size:
                    raise ValueError(f"a cache of {size} slots for {len(positions)} tokens")
                slots = positions % size
                tags[row, slots] = positions
                for ring, new in zip(self._rings[layer], kept, strict=True):
                    ring[row][:, slots] = new

    def extend(self, positions: Tensor, documents: Tensor | None) -> dict[Kind, AttentionMask]:
        """Append the positions (B,1) of one token per row; return its attention mask, per kind of layer."""
        assert documents is None, "padding is not copied, so there is one document per row"
        visible: dict[Kind, AttentionMask] = {}
        for kind, tags in self._tags.items():
            slots = self._slots[kind].copy_(positions[:, 0] % tags.shape[1])
            tags[self._row_index, slots] = positions[:, 0]
            visible[kind] = AttentionMask(positions, tags, self._windows[kind])
        return visible

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a token's key and value (B,K,1,H) into a layer's ring; return the ring (B,K,S,H)."""
        keys, values = self._rings[layer]
        slots = self._slots[self._kinds[layer]]
        keys[self._row_index, :, slots] = key[:, :, 0]
        values[self._row_index, :, slots] = value[:, :, 0]
        return keys, values


class CompiledDecoder:
    """The model with static shapes through torch.compile; on GPUs captured as a CUDA graph and replayed.

    All of its rows are computed at each step; those without a sequence are ignored.
    """

    def __init__(self, model: Gemma3, rows: int, capacity: int) -> None:
        slots = max(_MIN_STATIC, 1 << (capacity - 1).bit_length())
        device = model.embedding.weight.device
        # Static inputs: a captured graph reads and writes the same memory on each replay.
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        try:
            self._cache = StaticCache(model, rows, slots)
        except RuntimeError as error:  # torch has no other name for it
            reason = f"no memory for a cache of {slots:,} positions"
            raise DeviceError(f"decoding 'compiled': {reason}; make fewer tokens, or use 'plain'") from error
        step = _compiled_step(tuned=rows == 1 and device.type == "cuda")
        self._run = partial(step, model, self._tokens, self._positions, self._cache)
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self._occupied: list[int] = []  # the row of the cache of each row of a step
        self._index: Tensor | None = None  # the same as a tensor, None where they are all rows in order

    def insert(self, cache: BatchCache) -> None:
        """Copy the rows of a prefilled cache into free rows; ValueError where there are too few, or too few slots."""
        count = len(cache.rows(0))
        free = [row for row in range(len(self._tokens)) if row not in self._occupied]
        if len(free) < count:
            raise ValueError(f"{count} rows for a decoder with {len(free)} free ones")
        self._cache.fill(free[:count], cache)
        self._occupy([*self._occupied, *free[:count]])

    def evict(self, rows: Sequence[int]) -> None:
        """Free rows; those after them move up."""
        freed = [self._occupied[row] for row in rows]
        self._tokens[freed] = self._positions[freed] = 0  # computed on, and ignored
        self._occupy([row for row in self._occupied if row not in freed])

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B,V) after tokens (B,) at positions (B,), until the next step."""
        if self._index is None:
            self._tokens[:, 0], self._positions[:, 0] = tokens, positions
            return self._logits()
        self._tokens[self._index, 0], self._positions[self._index, 0] = tokens, positions
        return self._logits()[self._index]

    def _occupy(self, rows: list[int]) -> None:
        self._occupied = rows
        every = rows == list(range(len(self._tokens)))
        self._index = None if every else torch.tensor(rows, dtype=torch.long, device=self._tokens.device)

    def _logits(self) -> Tensor:
        """Run the step over all rows, or replay it."""
        if self._captured is None:
            logits = self._run()
            if logits.is_cuda:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # captured, not run
                    self._captured = graph, self._run()
            return logits
        graph, logits = self._captured
        graph.replay()
        return logits


def static_step(model: Gemma3, tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
    """Decode one token per row, (B,1); return the logits after it, (B,V). This function is compiled."""
    return model(tokens, positions, None, cache, output_head=last_logits)[:, 0]


@cache
def _compiled_step(tuned: bool) -> "_Step":
    # Tuned, matmuls with a single row become kernels of the compiler's own, fused with what comes before and after.
    options: dict[str, Any] | None = {"coordinate_descent_tuning": True} if tuned else None
    return compile_function(static_step, fullgraph=True, dynamic=False, options=options)


class _Step(Protocol):
    def __call__(self, model: Gemma3, tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor: ...
