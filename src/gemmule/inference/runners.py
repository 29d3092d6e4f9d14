"""Runners: one step over the KV cache, from tokens of any rows to the logits that are wanted.

Three runners give the logits of the model, at different speed:

plain     the model itself: the reference, on any device
native    the step in C on the CPU (`native/`); a token's logits do not depend on the rest of its step, bit for bit
compiled  the model with static shapes through torch.compile; on GPUs a CUDA graph
"""

from functools import cache, partial
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from gemmule.compiler import compile_function, reason_not_to_compile, uncompiled
from gemmule.errors import DeviceError
from gemmule.inference.kv_cache import KVCache
from gemmule.inference.modifications import find_modification
from gemmule.inference.native import runner as native
from gemmule.inference.pages import PAGE
from gemmule.inference.quantize import int8_weights
from gemmule.inference.step_batch import Ints, StepBatch
from gemmule.model.attention import AttentionMask
from gemmule.model.cache import EMPTY, Cache
from gemmule.model.config import Gemma3Config, Kind
from gemmule.model.gemma3 import Gemma3, all_logits

# "auto" is native where that is available, else plain: half a minute of compilation pays off for long outputs alone.
Decoding = Literal["auto", "plain", "native", "compiled"]
DECODINGS: tuple[str, ...] = get_args(Decoding)


class Runner(Protocol):
    """Runs steps over the KV cache that it was made for."""

    def run(self, batch: StepBatch) -> Tensor:
        """Write keys and values of the batch into the cache; return the logits (outputs,V), in fp32."""


def choose_decoding(model: Gemma3, wanted: Decoding) -> Decoding:
    """Resolve "auto"; DeviceError where the requested decoding is unavailable, with the reason and alternatives."""
    if wanted == "auto":
        return "plain" if native.unavailable_reason(model) else "native"
    reason = None
    if wanted == "native":
        reason = native.unavailable_reason(model)
    elif wanted == "compiled":
        reason = find_modification(model) or ("the weights are int8" if int8_weights(model) else None)
        reason = reason or reason_not_to_compile(model.embedding.weight.device)
    if reason:
        raise DeviceError(f"decoding {wanted!r}: {reason}; use 'plain' or 'auto'")
    return wanted


def cache_dtype(model: Gemma3, decoding: Decoding) -> torch.dtype:
    """Return the dtype of the KV cache that a runner works on; `decoding` is resolved."""
    return torch.float32 if decoding == "native" else model.embedding.weight.dtype


def make_runner(model: Gemma3, kv_cache: KVCache, decoding: Decoding) -> Runner:
    """Return the runner of a `decoding` that is resolved."""
    if decoding == "native":
        return native.NativeRunner(model, kv_cache)
    return CompiledRunner(model, kv_cache) if decoding == "compiled" else PlainRunner(model, kv_cache)


def slow_decoding_reason(model: Gemma3) -> str | None:
    """Return why "auto" would decode a model on the CPU without the native step, or None."""
    return native.unavailable_reason(model) if model.embedding.weight.device.type == "cpu" else None


class PagedView(Cache):
    """Some rows of a paged KV cache, as the model sees a cache: their pages side by side, (B,P) of each kind.

    `first` are the positions of the first slots, (B,).
    """

    def __init__(self, kv_cache: KVCache, pages: dict[Kind, Tensor], first: dict[Kind, Tensor]) -> None:
        super().__init__(kv_cache.config)
        self._kv_cache, self._pages, self._first = kv_cache, pages, first
        self._places: dict[Kind, tuple[Tensor, Tensor]] = {}

    def extend(self, positions: Tensor, _documents: Tensor | None) -> dict[Kind, AttentionMask]:
        """Announce tokens at positions (B,T); return their attention masks."""
        masks: dict[Kind, AttentionMask] = {}
        for kind, pages in self._pages.items():
            slots = torch.arange(pages.shape[1] * PAGE, device=pages.device)
            keys = self._first[kind][:, None] + slots
            # Slots after the newest token have been written by nobody, or by others.
            keys = torch.where(keys <= positions[:, -1:], keys, EMPTY)
            masks[kind] = AttentionMask(positions, keys, self._windows[kind])
            places = positions - self._first[kind][:, None]
            self._places[kind] = pages.gather(1, places // PAGE), places % PAGE
        return masks

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B,K,T,H) of a layer; return those of all pages (B,K,S,H)."""
        kind = self._kinds[layer]
        pool = self._kv_cache.pools[kind]
        pool.write(self.config, layer, self._places[kind], (key, value))
        return pool.keys_and_values(self.config, layer, self._pages[kind])

    @property
    def config(self) -> Gemma3Config:
        """The configuration of the model."""
        return self._kv_cache.config


class PlainRunner:
    """The model itself, the reference of the other runners: rows with one token together, others one by one."""

    def __init__(self, model: Gemma3, kv_cache: KVCache) -> None:
        self._model, self._cache = model, kv_cache
        self._device = model.embedding.weight.device

    def run(self, batch: StepBatch) -> Tensor:
        """Return the logits (outputs,V)."""
        starts = np.flatnonzero(np.diff(batch.rows, prepend=-1))
        counts = np.diff(starts, append=len(batch.rows))
        groups = [starts[counts == 1][:, None]] if (counts == 1).any() else []
        groups += [
            np.arange(start, start + count)[None] for start, count in zip(starts, counts, strict=True) if count > 1
        ]
        wanted = np.zeros(len(batch.tokens), dtype=bool)
        wanted[batch.outputs] = True
        order = [index[wanted[index]] for index in groups]
        logits = torch.cat([self._run(batch, index, wanted[index]) for index in groups])
        back = np.argsort(np.concatenate(order), kind="stable")
        return logits[torch.from_numpy(back).to(self._device)]

    def _run(self, batch: StepBatch, index: Ints, wanted: Any) -> Tensor:
        """Return the wanted logits of tokens (B,T), given by their indices in the batch."""
        tokens, positions = (self._to_device(array[index]) for array in (batch.tokens, batch.positions))
        view = paged_view(self._cache, batch.rows[index[:, 0]], batch.positions[index], self._device)
        chosen = self._to_device(wanted)

        def output_head(hidden: Tensor, vocabulary: Tensor) -> Tensor:
            return all_logits(hidden[chosen], vocabulary)

        with uncompiled():
            return self._model(tokens, positions, None, view, output_head=output_head)

    def _to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def paged_view(kv_cache: KVCache, rows: Ints, positions: Ints, device: torch.device) -> PagedView:
    """Return the view of rows (B,) that tokens at positions (B,T) need."""
    pages: dict[Kind, Tensor] = {}
    firsts: dict[Kind, Tensor] = {}
    for kind in kv_cache.pools:
        first = _first_pages(kv_cache, kind, positions[:, 0])
        count = int((positions[:, -1] // PAGE - first).max()) + 1
        index = np.minimum(first[:, None] + np.arange(count), kv_cache.tables[kind].shape[1] - 1)
        pages[kind] = torch.from_numpy(kv_cache.tables[kind][rows[:, None], index].astype(np.int64)).to(device)
        firsts[kind] = torch.from_numpy(first * PAGE).to(device)
    return PagedView(kv_cache, pages, firsts)


def _first_pages(kv_cache: KVCache, kind: Kind, positions: Ints) -> Ints:
    """Return the first page that a token at each position (B,) sees."""
    window = kv_cache.config.window(kind)
    return np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0) // PAGE


class CompiledRunner:
    """Rows with one token through torch.compile, all rows of the cache at once; on GPUs a captured CUDA graph.

    Static shapes: the number of pages is the power of two that holds the longest row. Rows with more tokens, pieces of
    prompts, go to the plain runner.
    """

    def __init__(self, model: Gemma3, kv_cache: KVCache) -> None:
        self._model, self._cache, self._plain = model, kv_cache, PlainRunner(model, kv_cache)
        self._device = model.embedding.weight.device
        self._rows = kv_cache.rows
        self._graphs: dict[int, _Graph] = {}  # by the number of pages

    def run(self, batch: StepBatch) -> Tensor:
        """Return the logits (outputs,V), until the next step."""
        starts = np.flatnonzero(np.diff(batch.rows, prepend=-1))
        if len(starts) < len(batch.rows) or len(batch.outputs) < len(batch.rows):
            return self._plain.run(batch)
        pages = int(batch.positions.max()) // PAGE + 1
        size = min(1 << (pages - 1).bit_length(), self._cache.longest // PAGE)
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._model, self._cache, self._rows, size, self._device)
        return self._graphs[size].run(batch)


class _Graph:
    """The compiled step for so many pages."""

    def __init__(self, model: Gemma3, kv_cache: KVCache, rows: int, pages: int, device: torch.device) -> None:
        self._cache, self._device = kv_cache, device
        self._host = torch.zeros(rows, 2, dtype=torch.long, device="cpu", pin_memory=device.type == "cuda")
        self._inputs = torch.zeros(rows, 2, dtype=torch.long, device=device)  # token and position
        self._pages: dict[Kind, Tensor] = {}
        self._first = {kind: torch.zeros(rows, dtype=torch.long, device=device) for kind in kv_cache.pools}
        for kind in kv_cache.pools:
            local = kind == "local" and kv_cache.config.window(kind) is not None
            count = min(pages, kv_cache.window_pages + 1) if local else pages
            self._pages[kind] = torch.zeros(rows, count, dtype=torch.long, device=device)
        view = PagedView(kv_cache, self._pages, self._first)
        step = _compiled_step(tuned=rows == 1 and device.type == "cuda")
        self._run = partial(step, model, self._inputs, view)
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def run(self, batch: StepBatch) -> Tensor:
        """Return the logits (outputs,V) of rows with one token each."""
        index = torch.from_numpy(batch.rows)
        self._host.zero_()
        self._host[index, 0], self._host[index, 1] = torch.from_numpy(batch.tokens), torch.from_numpy(batch.positions)
        self._inputs.copy_(self._host, non_blocking=True)
        for kind, held in self._pages.items():
            table = self._cache.tables[kind]
            first = np.zeros(len(table), dtype=np.int64)
            first[batch.rows] = _first_pages(self._cache, kind, batch.positions)
            columns = np.minimum(first[batch.rows, None] + np.arange(held.shape[1]), table.shape[1] - 1)
            pages = np.zeros(held.shape, dtype=np.int64)  # the other rows are computed, too, and write to page 0
            pages[batch.rows] = table[batch.rows[:, None], columns]
            held.copy_(torch.from_numpy(pages))
            self._first[kind].copy_(torch.from_numpy(first * PAGE))
        logits = self._logits()
        in_order = np.array_equal(batch.rows, np.arange(len(logits)))
        return logits if in_order else logits[index.to(self._device)]

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


def static_step(model: Gemma3, inputs: Tensor, view: PagedView) -> Tensor:
    """Decode one token per row, from tokens and positions (B,2) to logits (B,V). This function is compiled."""
    tokens, positions = inputs[:, :1], inputs[:, 1:]
    return model(tokens, positions, None, view, output_head=all_logits)[:, 0]


@cache
def _compiled_step(tuned: bool) -> "_Step":
    # Tuned, matmuls with a single row become kernels of the compiler's own, fused with what comes before and after.
    options: dict[str, Any] | None = {"coordinate_descent_tuning": True} if tuned else None
    return compile_function(static_step, fullgraph=True, dynamic=False, options=options)


class _Step(Protocol):
    def __call__(self, model: Gemma3, inputs: Tensor, view: PagedView) -> Tensor: ...
