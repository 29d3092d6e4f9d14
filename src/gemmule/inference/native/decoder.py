"""The decoder on `step.c`, which is compiled when it is first used; its reference is the model itself.

With one position per row, a step is bound by how fast the weights are read, and the hundreds of small operations
between the matrices would take as long again. The C file reads the model's own tensors where they lie: nothing is
copied, so the step follows weights that are changed in place. Where they are replaced during generation, it continues
with the old ones, which it keeps alive.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64

import torch
from torch import Tensor

from gemmule.inference.kv_cache import BatchCache
from gemmule.inference.modifications import find_modification
from gemmule.inference.native.binding import DTYPES, PackedModel, bind
from gemmule.inference.native.library import load_library
from gemmule.inference.quantize import named_weights
from gemmule.model.gemma3 import Gemma3

# With more rows the matmuls are work for matrix units (AMX), which the library of torch uses and the C file does not.
MAX_ROWS = 4
# Positions that a KV cache first takes memory for; it grows with the sequence.
FIRST_POSITIONS = 4096
_NO_MEMORY = 1  # what `step` returns, as in step.c


def unavailable_reason(model: Gemma3, rows: int = 1) -> str | None:
    """Return why native decoding is not available for a model, or None; the first call compiles step.c (2 s)."""
    if rows > MAX_ROWS:
        return f"{rows} rows, more than {MAX_ROWS}"
    if difference := find_modification(model):
        return difference
    for name, weight in named_weights(model):
        held = weight.data
        if (
            type(held) is not Tensor
            or held.device.type != "cpu"
            or held.dtype not in DTYPES
            or not held.is_contiguous()
        ):
            return f"{name} is {held.dtype} on {held.device}, not fp32, bf16 or int8 in the CPU's memory"
    library = load_library()
    return library if isinstance(library, str) else None


class NativeDecoder:
    """Decodes one token per row in C; rows join with the KV cache that a prefill left, and leave, between steps."""

    def __init__(self, model: Gemma3, capacity: int) -> None:
        """Make a decoder without rows; positions stay below `capacity`."""
        library = load_library()
        assert not isinstance(library, str), library
        self._step = bind(library)
        self._config, self._capacity = model.config, capacity
        self._packed = PackedModel(model, capacity)
        self._rings: dict[int, Tensor] = {}  # keys and values of each layer, (2,B,K,capacity,H)
        self._allocated = 0  # positions that the rings have memory for
        self._next: list[int] = []  # the next position of each row

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B,V) after tokens (B,) at positions (B,), the next position of each row.

        IndexError for a token that the vocabulary lacks; ValueError for other positions, or beyond the capacity.
        """
        ids, at = tokens.tolist(), positions.tolist()
        if at != self._next or len(ids) != len(at):
            raise ValueError(f"tokens {ids} at positions {at}: the next positions are {self._next}")
        if max(at) >= self._capacity:
            raise ValueError(f"position {max(at)}: the decoder was made for {self._capacity} positions")
        if max(at) >= self._allocated:
            self._allocate(range(len(at)), len(at), 2 * self._allocated)
        logits = torch.empty(len(ids), self._config.vocab_size, dtype=torch.float32, device="cpu")
        row, model = c_int64 * len(ids), ctypes.byref(self._packed.struct)
        result = self._step(model, row(*ids), row(*at), self._allocated, logits.data_ptr())
        if result == _NO_MEMORY:
            raise MemoryError("no memory for a decoding step")
        if result:
            raise IndexError(f"tokens {ids}: the vocabulary has {self._config.vocab_size}")
        self._next = [position + 1 for position in at]
        return logits

    def insert(self, cache: BatchCache) -> None:
        """Copy the rows of a prefilled cache behind those that are there; ValueError beyond the capacity."""
        present, new = len(self._next), cache.next_positions.expand(len(cache.rows(0))).tolist()
        if max(new) > self._capacity:
            raise ValueError(f"{max(new)} tokens: the decoder was made for {self._capacity} positions")
        self._allocate(range(present), present + len(new), max(self._allocated, FIRST_POSITIONS, 2 * max(new)))
        for index, layer in enumerate(self._packed.layers):
            for row, (positions, *kept) in enumerate(cache.rows(index), start=present):
                slots = positions % layer.capacity
                for ring, tensor in zip(self._rings[index], kept, strict=True):
                    ring[row, :, slots] = tensor.float()
        self._next += new

    def evict(self, rows: Sequence[int]) -> None:
        """Remove rows; those after them move up."""
        kept = [row for row in range(len(self._next)) if row not in rows]
        self._allocate(kept, len(kept), self._allocated)
        self._next = [self._next[row] for row in kept]

    def _allocate(self, kept: Sequence[int], rows: int, positions: int) -> None:
        """Allocate rings for `rows` rows and so many positions, up to the capacity, and copy the rows that are kept.

        Local layers need slots for their window alone.
        """
        config, positions = self._config, min(self._capacity, positions)
        unchanged = [*kept] == [*range(rows)] and rows == self._packed.struct.batch
        # Positions below the next ones are all that was written; a ring that is not a whole window lies in their order.
        written = max((self._next[row] for row in kept), default=0)
        for index, layer in enumerate(self._packed.layers):
            size = min(layer.window or positions, positions)
            if unchanged and size == layer.capacity:
                continue
            ring = torch.empty(
                (2, rows, config.num_key_value_heads, size, config.head_dim), dtype=torch.float32, device="cpu"
            )
            if kept:
                filled = min(written, layer.capacity)
                ring[:, : len(kept), :, :filled] = self._rings[index][:, [*kept], :, :filled]
            self._rings[index], layer.capacity = ring, size
            layer.keys, layer.values = ring[0].data_ptr(), ring[1].data_ptr()
        self._allocated, self._packed.struct.batch = positions, rows
