"""A packed file in step.wasm, run by wasmtime: what a page computes, without a browser."""

import ctypes
import functools
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmule.errors import MissingExtra
from gemmule.inference.native.binding import BatchStruct, LayerStruct, ModelStruct
from gemmule.inference.pages import PAGE

_CHUNK = 64  # tokens of a step
_KINDS = ("f32", "bf16", "int8")
_NORMS = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", "query_norm", "key_norm")


@functools.cache
def _in_wasm(kind: Any) -> Any:
    """Return a type of ctypes as WebAssembly has it, with pointers of 32 bits."""
    if kind is ctypes.c_void_p or hasattr(kind, "contents"):
        return ctypes.c_uint32
    if issubclass(kind, ctypes.Array):
        return _in_wasm(kind._type_) * kind._length_
    if issubclass(kind, ctypes.Structure):
        members: Any = kind._fields_
        fields = [(name, _in_wasm(member)) for name, member in members]
        return type(kind.__name__, (ctypes.LittleEndianStructure,), {"_fields_": fields})
    return kind


_MODEL, _LAYER, _BATCH = (_in_wasm(kind) for kind in (ModelStruct, LayerStruct, BatchStruct))


class WasmModel:
    """A model of a packed file in the memory of step.wasm, with a KV cache for one text of so many positions."""

    def __init__(self, wasm: bytes, packed: bytes, positions: int) -> None:
        """Load both; MissingExtra without wasmtime."""
        try:
            import wasmtime
        except ImportError:
            raise MissingExtra("wasmtime", "verify", "verifying a page") from None
        self._engine = wasmtime.Engine()
        self._store = wasmtime.Store(self._engine)
        module = wasmtime.Module(self._engine, wasm)
        self._exports: Any = wasmtime.Instance(self._store, module, []).exports(self._store)
        module.close()
        self._exports["_initialize"](self._store)
        (length,) = struct.unpack_from("<Q", packed, 56)
        self._header: dict[str, Any] = json.loads(packed[64 : 64 + length])
        address = self._allocate(len(packed) + 64)
        address += -address % 64
        self._exports["memory"].write(self._store, packed, address)
        self._arrays = address + 64 + length
        self.vocabulary: int = self._header["vocab_size"]
        self._longest = -(-positions // PAGE) * PAGE
        self._model = self._put(bytes(self._describe()))
        self._pages = [self._make_pages(kind) for kind in (0, 1)]
        floats = self._call("workspace_floats", self._model, _CHUNK, self._longest)
        self._workspace, self._logits = self._allocate(4 * floats), self._allocate(4 * _CHUNK * self.vocabulary)

    def close(self) -> None:
        """Free its memory; wasmtime itself would do it when the process ends, with messages."""
        self._store.close()
        self._engine.close()

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits (T, V) after each of the ids, which begin a text."""
        parts = [self.read(ids[at : at + _CHUNK], at) for at in range(0, len(ids), _CHUNK)]
        return np.concatenate(parts)

    def continue_greedily(self, prompt: Sequence[int], tokens: int, stops: Sequence[int]) -> list[int]:
        """Return the likeliest continuation of a prompt, up to a stop token, which is included."""
        drawn: list[int] = []
        last = self.logits(prompt)[-1]
        while True:
            drawn.append(int(last.argmax()))
            if len(drawn) == tokens or drawn[-1] in stops:
                return drawn
            last = self.read(drawn[-1:], len(prompt) + len(drawn) - 1)[-1]

    def read(self, ids: Sequence[int], first: int) -> npt.NDArray[np.float32]:
        """Read at most _CHUNK ids at the positions from `first` on; return their logits (T, V)."""
        count = len(ids)
        tokens, positions, rows, outputs = (
            self._put(np.asarray(numbers, dtype=np.int64).tobytes())
            for numbers in (ids, range(first, first + count), [0] * count, range(count))
        )
        batch = self._put(
            bytes(_BATCH(count, 1, self._longest, tokens, positions, rows, count, outputs, tuple(self._pages)))
        )
        if failed := self._call("step", self._model, batch, self._workspace, self._logits):
            raise IndexError(f"step {failed}")
        for address in (tokens, positions, rows, outputs, batch):
            self._call("free", address)
        size = 4 * count * self.vocabulary
        content = self._exports["memory"].read(self._store, self._logits, self._logits + size)
        return np.frombuffer(content, dtype="<f4").reshape(count, self.vocabulary)

    def _call(self, name: str, *arguments: int) -> int:
        return self._exports[name](self._store, *arguments)

    def _allocate(self, size: int) -> int:
        address = self._call("malloc", max(size, 8)) & 0xFFFFFFFF
        if not address:
            raise MemoryError(f"no memory for {size} bytes in WebAssembly")
        return address

    def _put(self, content: bytes) -> int:
        address = self._allocate(len(content))
        self._exports["memory"].write(self._store, content, address)
        return address

    def _place(self, key: str, layer: int = 0) -> int:
        return self._arrays + self._header["arrays"][key][layer]

    def _matrix(self, key: str, layer: int, rows: int, columns: int) -> tuple[int, ...]:
        dtype = self._header["dtype"]
        scales = self._place(f"{key}_scales", layer) if dtype == "int8" else 0
        return (self._place(key, layer), scales, rows, columns, _KINDS.index(dtype))

    def _describe(self) -> Any:
        """Return `Model` of step.c."""
        header = self._header
        width, inner, size = header["hidden_size"], header["intermediate_size"], header["head_dim"]
        heads, groups, kinds = header["num_attention_heads"], header["num_key_value_heads"], header["layer_kinds"]
        shapes = {
            "query": (heads * size, width), "key": (groups * size, width), "value": (groups * size, width),
            "output": (width, heads * size), "gate": (inner, width), "up": (inner, width), "down": (width, inner),
        }  # fmt: skip
        self._layer_floats = 2 * groups * size * PAGE
        layers = (_LAYER * len(kinds))(
            *(
                _LAYER(
                    *(self._matrix(key, i, *shape) for key, shape in shapes.items()),
                    *(self._place(key, i) for key in _NORMS),
                    kind,
                    kinds[:i].count(kind) * self._layer_floats,
                )
                for i, kind in enumerate(kinds)
            )
        )
        embedding = self._matrix("embedding", 0, self.vocabulary, width)
        frequencies = self._place("frequencies")
        rope = zip(header["windows"], header["rope_factors"], strict=True)
        return _MODEL(
            *(width, heads, groups, size, inner, len(kinds)),
            header["rms_norm_eps"],
            header["embedding_scale"],
            header["query_pre_attn_scalar"] ** -0.5,
            embedding,
            embedding if header["tied"] else self._matrix("head", 0, self.vocabulary, width),
            self._place("norm"),
            self._put(bytes(layers)),
            tuple((frequencies + kind * 2 * size, window, factor) for kind, (window, factor) in enumerate(rope)),
            1,
        )

    def _make_pages(self, kind: int) -> tuple[int, int, int, int]:
        """Return `Pages` of step.c: one page after the other, none of which is used again."""
        pages, floats = self._longest // PAGE, self._header["layer_kinds"].count(kind) * self._layer_floats
        memory = self._put(bytes(4 * floats * (pages + 1)))
        return memory, pages + 1, floats, self._put(np.arange(1, pages + 1, dtype=np.int32).tobytes())
