"""The ctypes structures of `step.c`, filled in with pointers to a model's own tensors."""

import ctypes
import math
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from gemmule.inference.pages import KINDS
from gemmule.inference.quantize import Int8
from gemmule.model.config import Kind
from gemmule.model.gemma3 import Block, Gemma3, RMSNorm

# The values of `kind` of a matrix in step.c; that of a layer is its place in KINDS.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", "query_norm", "key_norm")
_SIZES = ("width", "heads", "groups", "size", "inner", "layers")
_SCALES = ("eps", "embedding_scale", "query_scale")


class MatrixStruct(Structure):
    """`Matrix` of step.c."""

    _fields_ = (("data", c_void_p), ("scales", c_void_p), ("rows", c_int64), ("columns", c_int64), ("kind", c_int64))


class LayerStruct(Structure):
    """`Layer` of step.c."""

    _fields_ = (
        *((name, MatrixStruct) for name in _MATRICES),
        *((name, c_void_p) for name in _NORMS),
        ("kind", c_int64),
        ("offset", c_int64),
    )


class KindStruct(Structure):
    """`Kind` of step.c."""

    _fields_ = (("frequencies", c_void_p), ("window", c_int64), ("factor", c_float))


class ModelStruct(Structure):
    """`Model` of step.c."""

    _fields_ = (
        *((name, c_int64) for name in _SIZES),
        *((name, c_float) for name in _SCALES),
        ("embedding", MatrixStruct),
        ("head", MatrixStruct),
        ("norm", c_void_p),
        ("layer", POINTER(LayerStruct)),
        ("kinds", KindStruct * len(KINDS)),
        ("threads", c_int64),
    )


class PagesStruct(Structure):
    """`Pages` of step.c."""

    _fields_ = (("memory", c_void_p), ("pages", c_int64), ("floats", c_int64), ("table", c_void_p))


class BatchStruct(Structure):
    """`Batch` of step.c."""

    _fields_ = (
        *((name, c_int64) for name in ("count", "rows", "longest")),
        *((name, c_void_p) for name in ("tokens", "positions", "row")),
        ("outputs", c_int64),
        ("output", c_void_p),
        ("pages", PagesStruct * len(KINDS)),
    )


class PackedModel:
    """The structures of a model, and the tensors that they point to; `struct` is passed to C.

    `offsets` says where the keys and values of each layer lie in a page of its kind, in numbers.
    """

    def __init__(self, model: Gemma3, offsets: Sequence[int]) -> None:
        config = model.config
        self.tensors: list[Tensor] = []  # kept alive for as long as C has pointers to them
        self.layers = (LayerStruct * config.num_hidden_layers)()
        kinds = config.layer_kinds
        for block, layer, kind, offset in zip(model.blocks, self.layers, kinds, offsets, strict=True):
            assert isinstance(block, Block)
            self._pack_weights(block, layer)
            layer.kind, layer.offset = KINDS.index(kind), offset
        embedding = self._matrix(model.embedding.weight)
        self.struct = ModelStruct(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.num_hidden_layers,
            config.rms_norm_eps,
            # Rounded as the model rounds it.
            float(torch.tensor(math.sqrt(config.hidden_size), dtype=model.embedding.weight.dtype, device="cpu")),
            config.query_pre_attn_scalar**-0.5,
            embedding,
            embedding if model.head is None else self._matrix(model.head.weight),
            self._gain(model.norm),
            self.layers,
            (KindStruct * len(KINDS))(*(self._kind(model, kind) for kind in KINDS)),
            torch.get_num_threads(),
        )

    def _pack_weights(self, block: Block, layer: LayerStruct) -> None:
        for owner, names in ((block.attention, _MATRICES[:4]), (block.mlp, _MATRICES[4:])):
            for name in names:
                setattr(layer, name, self._matrix(getattr(owner, name).weight))
        for name in _NORMS:
            setattr(layer, name, self._gain(getattr(block if hasattr(block, name) else block.attention, name)))

    def _kind(self, model: Gemma3, kind: Kind) -> KindStruct:
        base, factor = model.config.rope(kind)
        size = model.config.head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
        return KindStruct(self._pointer(base**-exponents), model.config.window(kind) or 0, factor)

    def _matrix(self, weight: Tensor | Int8) -> MatrixStruct:
        scales = self._pointer(weight.scales) if isinstance(weight, Int8) else None
        return MatrixStruct(self._pointer(weight.data), scales, *weight.shape, DTYPES[weight.data.dtype])

    def _gain(self, norm: RMSNorm) -> int:
        return self._pointer(1 + norm.weight.detach().float())

    def _pointer(self, tensor: Tensor) -> int:
        """Return the address of a tensor, which is kept alive with this object."""
        if tensor.data_ptr() % tensor.element_size():  # from a file whose header was not padded; C cannot read it there
            tensor = tensor.clone()
        self.tensors.append(tensor)
        return tensor.data_ptr()


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions of a compiled step.c the types of their arguments; return the library."""
    library.step.argtypes = [POINTER(ModelStruct), POINTER(BatchStruct), c_void_p, c_void_p]
    library.workspace_floats.argtypes = [POINTER(ModelStruct), c_int64, c_int64]
    library.workspace_floats.restype = c_int64
    return library
