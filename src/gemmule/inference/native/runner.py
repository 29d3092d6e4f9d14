"""The runner on `step.c`, which is compiled when it is first used; its reference is the model itself.

The C file reads the model's own tensors where they lie: nothing is copied, so a step follows weights that are changed
in place. Where they are replaced during generation, it continues with the old ones, which it keeps alive. The logits
of a token do not depend on the other tokens of its step, bit for bit.
"""

import ctypes

import numpy as np
import torch
from torch import Tensor

from gemmule.inference.kv_cache import KVCache
from gemmule.inference.modifications import find_modification
from gemmule.inference.native.binding import DTYPES, BatchStruct, PackedModel, PagesStruct, bind
from gemmule.inference.native.library import load_library
from gemmule.inference.pages import KINDS, layer_offsets
from gemmule.inference.quantize import named_weights
from gemmule.inference.step_batch import StepBatch
from gemmule.model.config import Kind
from gemmule.model.gemma3 import Gemma3

# What `step` returns where something is out of range, as in step.c.
_ERRORS = {2: "a token that the vocabulary lacks", 3: "a row or a position", 4: "a page", 5: "an output"}


def unavailable_reason(model: Gemma3) -> str | None:
    """Return why the native step is not available for a model, or None; the first call compiles step.c (2 s)."""
    if difference := find_modification(model):
        return difference
    dtypes: dict[torch.dtype, str] = {}
    for name, weight in named_weights(model):
        held = weight.data
        if (
            type(held) is not Tensor
            or held.device.type != "cpu"
            or held.dtype not in DTYPES
            or not held.is_contiguous()
        ):
            return f"{name} is {held.dtype} on {held.device}, not fp32, bf16 or int8 in the CPU's memory"
        if held.ndim > 1:
            dtypes[held.dtype] = name
    if len(dtypes) > 1:
        return " and ".join(f"{name} is {dtype}" for dtype, name in dtypes.items()) + ", not of one dtype"
    library = load_library()
    return library if isinstance(library, str) else None


class NativeRunner:
    """Runs a step in C over the pages of a KV cache in fp32."""

    def __init__(self, model: Gemma3, cache: KVCache) -> None:
        library = load_library()
        assert not isinstance(library, str), library
        self._library, self._cache = bind(library), cache
        self._vocabulary = model.config.vocab_size
        self._packed = PackedModel(model, layer_offsets([*cache.pools.values()], model.config.num_hidden_layers))
        self._workspace = torch.empty(0, dtype=torch.float32, device="cpu")
        self._sizes: dict[tuple[int, int], int] = {}  # floats of the workspace, by tokens and positions

    def run(self, batch: StepBatch) -> Tensor:
        """Return the logits (outputs,V); IndexError where something in the batch is out of range."""
        model, size = ctypes.byref(self._packed.struct), (len(batch.tokens), self._cache.longest)
        if size not in self._sizes:
            self._sizes[size] = self._library.workspace_floats(model, *size)
        if self._sizes[size] > len(self._workspace):
            self._workspace = torch.empty(self._sizes[size], dtype=torch.float32, device="cpu")
        logits = torch.empty(len(batch.outputs), self._vocabulary, dtype=torch.float32, device="cpu")
        result = self._library.step(
            model, ctypes.byref(self._describe(batch)), self._workspace.data_ptr(), logits.data_ptr()
        )
        if result == 1:
            raise MemoryError("no memory for a step")
        if result:
            raise IndexError(f"{_ERRORS[result]} of the step is out of range: {batch}")
        return logits

    def _describe(self, batch: StepBatch) -> BatchStruct:
        pages = [self._pages(kind) for kind in KINDS]
        arrays = (batch.tokens, batch.positions, batch.rows, batch.outputs)
        assert all(array.dtype == np.int64 and array.flags.c_contiguous for array in arrays)
        if not len(batch.tokens) == len(batch.positions) == len(batch.rows):
            raise IndexError(f"tokens, positions and rows of different lengths: {batch}")
        tokens, positions, rows, outputs = (array.ctypes.data for array in arrays)
        return BatchStruct(
            len(batch.tokens),
            self._cache.rows,
            self._cache.longest,
            tokens,
            positions,
            rows,
            len(batch.outputs),
            outputs,
            (PagesStruct * len(KINDS))(*pages),
        )

    def _pages(self, kind: Kind) -> PagesStruct:
        pool, table = self._cache.pools.get(kind), self._cache.tables[kind].ctypes.data
        if pool is None:
            return PagesStruct(None, 0, 0, table)
        return PagesStruct(pool.memory.data_ptr(), len(pool.memory), pool.memory.shape[1], table)
