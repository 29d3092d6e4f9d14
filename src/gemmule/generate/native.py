"""A decoding step in C for the CPU (`step.c`), compiled when it is first used; its twin is the model itself.

At one position a row, a step is bound by how fast the weights are read, and the hundreds of small operations between
the matrices would take as long again. The C file reads the model's own tensors where they lie: nothing is copied, so
the step follows the weights.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from gemmule.generate.weights import Int8, all_weights
from gemmule.model.cache import Cache
from gemmule.model.gemma3 import Block, Gemma3, RMSNorm

SOURCE = Path(__file__).with_name("step.c")
# Sums may be taken in any order, which is what lets a compiler use vectors; infinities and rounding stay as they are.
FLAGS = ("-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
OPTIONAL = ("-fopenmp", "-mprefer-vector-width=512")  # that not every compiler has
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# With more rows the products are work for matrix units (AMX), which the library of torch uses and the C file does not.
MOST_ROWS = 4


class _Matrix(Structure):
    _fields_ = (("data", c_void_p), ("scales", c_void_p), ("rows", c_int64), ("columns", c_int64), ("kind", c_int64))


_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", "query_norm", "key_norm")


class _Layer(Structure):
    _fields_ = (
        *((name, _Matrix) for name in _MATRICES),
        *((name, c_void_p) for name in (*_NORMS, "frequencies", "keys", "values")),
        ("capacity", c_int64),
        ("window", c_int64),
        ("factor", c_float),
    )


_SIZES = ("batch", "width", "heads", "groups", "size", "inner", "layers")
_SCALES = ("eps", "embedding_scale", "query_scale")


class _Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in _SIZES),
        *((name, c_float) for name in _SCALES),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("norm", c_void_p),
        ("layer", POINTER(_Layer)),
        ("threads", c_int64),
    )


def reason_against(model: Gemma3, rows: int = 1) -> str | None:
    """Return why this model cannot be stepped in C here, or None; the first question compiles the file (2 s)."""
    if rows > MOST_ROWS:
        return f"{rows} rows, more than {MOST_ROWS}"
    if type(model) is not Gemma3 or "forward" in vars(model):
        return "the model's forward is not Gemma 3's own"
    for name, weight in all_weights(model):
        held = weight.data
        if type(held) is not Tensor or held.device.type != "cpu" or held.dtype not in KINDS or not held.is_contiguous():
            return f"{name} is {held.dtype} on {held.device}, not fp32, bf16 or int8 in the CPU's memory"
    library = _library()
    return library if isinstance(library, str) else None


class NativeDecoder:
    """Feeds one token a row through the model in C, from what a prefill left in a cache."""

    def __init__(self, model: Gemma3, cache: Cache, rows: int, capacity: int) -> None:
        """Take over a cache of `rows` rows; at most `capacity` positions will be reached."""
        library = _library()
        assert not isinstance(library, str), library
        config = model.config
        self._step, self._vocabulary, self._longest = library.step, config.vocab_size, capacity
        self._kept: list[object] = [model]  # whatever C has pointers to
        layers = (_Layer * config.num_hidden_layers)()
        for index, (block, layer) in enumerate(zip(model.blocks, layers, strict=True)):
            assert isinstance(block, Block)
            self._describe(model, block, index, layer, cache, rows, capacity)
        embedding = self._matrix(model.embedding.weight)
        self._model = _Model(
            rows,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.num_hidden_layers,
            config.rms_norm_eps,
            # Rounded as the model rounds it.
            float(torch.tensor(math.sqrt(config.hidden_size), dtype=model.embedding.weight.dtype)),
            config.query_pre_attn_scalar**-0.5,
            embedding,
            embedding if model.head is None else self._matrix(model.head.weight),
            self._gain(model.norm),
            layers,
            torch.get_num_threads(),
        )

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B,V) after tokens (B,) at positions (B,)."""
        tokens, positions = tokens.contiguous(), positions.contiguous()
        logits = torch.empty(tokens.shape[0], self._vocabulary)
        failed = self._step(
            ctypes.byref(self._model), tokens.data_ptr(), positions.data_ptr(), self._longest, logits.data_ptr()
        )
        if failed:
            raise MemoryError("no memory for a decoding step")
        return logits

    def _describe(
        self, model: Gemma3, block: Block, index: int, layer: _Layer, cache: Cache, rows: int, capacity: int
    ) -> None:
        """Fill in the structure of a layer, and its rings with what the cache holds."""
        config, attention, mlp = model.config, block.attention, block.mlp
        for owner, names in ((attention, _MATRICES[:4]), (mlp, _MATRICES[4:])):
            for name in names:
                setattr(layer, name, self._matrix(getattr(owner, name).weight))
        for name in _NORMS:
            setattr(layer, name, self._gain(getattr(block if hasattr(block, name) else attention, name)))
        kind = config.layer_kinds[index]
        window = config.window(kind)
        base, layer.factor = config.rope(kind)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        layer.frequencies = self._keep(base**-exponents)
        layer.window = window or 0
        layer.capacity = min(window or capacity, capacity)
        # Untouched memory costs nothing, so a long limit is no waste.
        ring = (rows, config.num_key_value_heads, layer.capacity, config.head_dim)
        keys, values = torch.empty(ring), torch.empty(ring)
        positions, kept_keys, kept_values = cache.kept(index)
        for row, places in enumerate(positions.expand(rows, -1)):
            real = places >= 0
            slots = places[real] % layer.capacity
            keys[row, :, slots] = kept_keys[row, :, real].float()
            values[row, :, slots] = kept_values[row, :, real].float()
        layer.keys, layer.values = self._keep(keys), self._keep(values)

    def _matrix(self, weight: Tensor | Int8) -> _Matrix:
        scales = self._keep(weight.scales) if isinstance(weight, Int8) else None
        return _Matrix(weight.data.data_ptr(), scales, *weight.shape, KINDS[weight.data.dtype])

    def _gain(self, norm: RMSNorm) -> int:
        return self._keep(1 + norm.weight.detach().float())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


@functools.cache
def _library() -> "ctypes.CDLL | str":
    """Return the compiled file, from the user's cache folder where it is there already; or what is in the way."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "no C compiler (cc) was found"
    try:
        # What the compiler knows of this processor, and of itself: a folder may be shared by different machines.
        target = _run(compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull)
        name = hashlib.blake2b(SOURCE.read_bytes() + repr(FLAGS).encode() + target, digest_size=12).hexdigest()
        file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemmule" / f"step-{name}.so"
        if not file.exists():
            _compile(compiler, file)
        library = ctypes.CDLL(str(file))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"{compiler} did not compile it: {said.strip().splitlines()[0] if said.strip() else error}"
    library.step.argtypes = [POINTER(_Model), c_void_p, c_void_p, c_int64, c_void_p]
    library.step.restype = ctypes.c_int
    return library


def _compile(compiler: str, file: Path) -> None:
    """Compile into a new file that takes its place in one go, since other processes may do the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        fresh = Path(folder) / file.name
        for left in range(len(OPTIONAL), -1, -1):
            options = OPTIONAL[:left]
            try:
                _run(
                    compiler,
                    *FLAGS,
                    *options,
                    "-std=gnu11",
                    "-D_GNU_SOURCE",
                    "-shared",
                    "-fPIC",
                    str(SOURCE),
                    "-o",
                    str(fresh),
                    "-lm",
                )
                break
            except subprocess.CalledProcessError:
                if not options:
                    raise
        fresh.replace(file)


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
