"""The packed file: one file with a model and its vocabulary, for programs without a library (docs/formats.md).

Little-endian. A fixed beginning with a SHA-256 of the rest, a JSON header, then arrays aligned to 64 bytes. The header
says everything, and its offsets follow from the rest of it, so a reader can refuse any other.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemmule.errors import ModelError
from gemmule.files import atomic_write
from gemmule.formats.config_json import check_config
from gemmule.formats.packed_vocabulary import PackedVocabulary, pack_vocabulary, vocabulary_problem
from gemmule.model.config import Gemma3Config, Kind
from gemmule.model.gemma3 import Block, Gemma3, RMSNorm
from gemmule.model.init import meta_model
from gemmule.model.int8 import round_rows
from gemmule.reading import path_kind
from gemmule.tokenizer import Tokenizer

MAGIC, VERSION = b"GEMMPACK", 1
DTYPES = ("f32", "bf16", "int8")
ALIGNMENT = 64  # bytes
# Magic, version, zero; SHA-256 of everything from _HASHED on; bytes of the file, bytes of the header.
_BEGINNING = struct.Struct("<8sII32sQQ")
_HASHED = 48
_LARGEST_HEADER = 1 << 24
# After a packed file at the end of a program: its length, and the magic.
TRAILER = struct.Struct("<Q8s")

_KINDS: tuple[Kind, ...] = ("local", "global")
_MLP, _HEAD_NORMS = ("gate", "up", "down"), ("query_norm", "key_norm")
_MATRICES = ("query", "key", "value", "output", *_MLP)
_NORMS = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", *_HEAD_NORMS)
# The settings of a model that the header has under their own names.
_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_COUNTS = (
    "num_characters", "num_merges", "num_added_tokens", "token_text_bytes", "added_text_bytes", "parameters", "tied",
)  # fmt: skip
_UNLIMITED = 2**53  # the window of local layers that see everything
_IDS = ("bos", "stops", "start_of_turn", "end_of_turn", "chat")


class Packed(NamedTuple):
    """What a packed file holds; the weights are fp32, int8 ones times their scales."""

    model: Gemma3
    vocabulary: PackedVocabulary
    name: str
    dtype: str


class _Array(NamedTuple):
    """An array of the file: its entry in the header, its shape, and its dtype in numpy's letters."""

    key: str
    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        """Bytes of it."""
        return prod(self.shape) * np.dtype(self.kind).itemsize


def save_packed(model: Gemma3, tokenizer: Tokenizer, out: Path, dtype: str, name: str) -> None:
    """Write a model with finite weights and its tokenizer as a packed file; `dtype` is that of the matrices.

    Matrices are rounded one at a time. Raises OutputError, and TokenizerError as `pack_vocabulary`.
    """
    vocabulary = pack_vocabulary(tokenizer, model.config.vocab_size)
    facts = _describe(model, vocabulary, dtype, name)
    offsets, size = _lay_out(facts)
    header = _encode_header(facts | {"arrays": offsets})
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        file.write(_BEGINNING.pack(MAGIC, VERSION, 0, bytes(32), _BEGINNING.size + len(header) + size, len(header)))
        file.write(header)
        for array, content in zip(_arrays(facts), _contents(model, vocabulary, dtype), strict=True):
            assert (array.shape, np.dtype(array.kind)) == (content.shape, content.dtype), array
            file.write(content.tobytes())
            file.write(bytes(-content.nbytes % ALIGNMENT))
        file.flush()
        digest = _digest(temporary)
        file.seek(_HASHED - len(digest))
        file.write(digest)


def load_packed(path: Path) -> Packed:
    """Read a packed file, alone or at the end of a program; ModelError where it is missing, foreign or damaged."""
    facts, body = _read(path)
    config = _check_header(path, facts)
    offsets, size = _lay_out(facts)
    if facts.get("arrays") != offsets or size != len(body):
        raise _damaged(path, "its offsets are not those of its shape")
    found: dict[str, list[npt.NDArray[Any]]] = {}
    places = {key: iter(starts) for key, starts in offsets.items()}
    for key, shape, kind in _arrays(facts):
        flat = np.frombuffer(body, kind, prod(shape), next(places[key]))
        found.setdefault(key, []).append(flat.reshape(shape))
    vocabulary = _vocabulary(facts, found)
    if problem := vocabulary_problem(vocabulary, config.vocab_size):
        raise _damaged(path, problem)
    return Packed(_model(config, facts, found), vocabulary, facts["name"], facts["dtype"])


# ---- the header ----


def _describe(model: Gemma3, vocabulary: PackedVocabulary, dtype: str, name: str) -> dict[str, Any]:
    """Return the header without the offsets."""
    config = model.config
    scale = torch.full((), math.sqrt(config.hidden_size), dtype=model.embedding.weight.dtype, device="cpu")
    return {
        "name": name,
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{setting: getattr(config, setting) for setting in _SETTINGS},
        "embedding_scale": scale.item(),  # rounded as the model rounds it
        **_layers(config),
        **{entry: getattr(vocabulary, entry) for entry in _IDS},
        "num_characters": len(vocabulary.characters),
        "num_merges": len(vocabulary.merges),
        "num_added_tokens": len(vocabulary.added_tokens),
        "token_text_bytes": len(vocabulary.token_texts),
        "added_text_bytes": len(vocabulary.added_texts),
    }


def _layers(config: Gemma3Config) -> dict[str, Any]:
    """Return the kind of each layer, and of each kind the window (0: all positions), RoPE base and RoPE factor."""
    return {
        "tied": int(config.tie_word_embeddings),
        "layer_kinds": [_KINDS.index(kind) for kind in config.layer_kinds],
        "windows": [config.window(kind) or 0 for kind in _KINDS],
        "rope_bases": [config.rope(kind)[0] for kind in _KINDS],
        "rope_factors": [config.rope(kind)[1] for kind in _KINDS],
    }


def _encode_header(header: Mapping[str, Any]) -> bytes:
    """Return the one JSON text of a header: ASCII without white space, padded with spaces."""
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return text + b" " * (-len(text) % ALIGNMENT)


def _check_header(path: Path, facts: dict[str, Any]) -> Gemma3Config:
    """Return the config that a header describes; ModelError where one of its entries cannot be."""
    try:
        kinds, windows, bases, factors = (
            facts[key] for key in ("layer_kinds", "windows", "rope_bases", "rope_factors")
        )
        values = {key: facts[key] for key in _SETTINGS} | {
            "tie_word_embeddings": facts["tied"] == 1,
            "sliding_window": windows[0] or _UNLIMITED,
            "sliding_window_pattern": kinds.index(1) + 1 if 1 in kinds else len(kinds) + 1,
            "rope_local_base_freq": bases[0],
            "rope_theta": bases[1],
            "rope_scaling_factor": factors[1],
        }
        config = check_config(values, path)
        counts = [facts[key] for key in _COUNTS]
        ids = [facts["bos"], facts["start_of_turn"], facts["end_of_turn"], *facts["stops"]]
        plain = all(type(number) is int and -1 <= number < 1 << 40 for number in counts + ids) and min(counts) >= 0
        scale, texts = facts["embedding_scale"], (facts["name"], facts["dtype"], facts["chat"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, f"its header is incomplete ({error!r})") from None
    expected = _layers(config)
    if {key: facts[key] for key in expected} != expected or len(kinds) != config.num_hidden_layers:
        raise _damaged(path, "its layers are not those of a Gemma 3")
    if not plain or type(scale) is not float or not 0 < scale < math.inf or facts["dtype"] not in DTYPES:
        raise _damaged(path, "a number of its header is out of range")
    if not all(isinstance(text, str) for text in texts):
        raise _damaged(path, "its name or its chat is not a text")
    return config


# ---- the arrays ----


def _arrays(facts: Mapping[str, Any]) -> Iterator[_Array]:
    """Yield the arrays of a file in their order, from what its header says of its shape."""
    rows, width, inner, size = (facts[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim"))
    queries, keys = facts["num_attention_heads"] * size, facts["num_key_value_heads"] * size
    yield _Array("frequencies", (len(_KINDS), size // 2), "<f4")
    for key, length in (
        ("token_starts", rows + 1),
        ("byte_tokens", 256),
        ("added_starts", facts["num_added_tokens"] + 1),
    ):
        yield _Array(key, (length,), "<u4")
    for key, columns in (("characters", 2), ("merges", 3), ("added_tokens", 2)):
        yield _Array(key, (facts[f"num_{key}"], columns), "<u4")
    for key in ("token_text", "added_text"):
        yield _Array(f"{key}s", (facts[f"{key}_bytes"],), "|u1")
    yield _Array("norm", (width,), "<f4")
    yield from _matrix_arrays("embedding", (rows, width), facts["dtype"])
    shapes = (
        (queries, width),
        (keys, width),
        (keys, width),
        (width, queries),
        (inner, width),
        (inner, width),
        (width, inner),
    )
    for _ in facts["layer_kinds"]:
        for key, length in zip(_NORMS, (width,) * 4 + (size,) * 2, strict=True):
            yield _Array(key, (length,), "<f4")
        for key, shape in zip(_MATRICES, shapes, strict=True):
            yield from _matrix_arrays(key, shape, facts["dtype"])
    if not facts["tied"]:
        yield from _matrix_arrays("head", (rows, width), facts["dtype"])


def _matrix_arrays(key: str, shape: tuple[int, int], dtype: str) -> Iterator[_Array]:
    yield _Array(key, shape, {"f32": "<f4", "bf16": "<u2", "int8": "|i1"}[dtype])
    if dtype == "int8":
        yield _Array(f"{key}_scales", shape[:1], "<f4")


def _lay_out(facts: Mapping[str, Any]) -> tuple[dict[str, list[int]], int]:
    """Return where the arrays begin, counted from the end of the header, and how many bytes they take."""
    offsets: dict[str, list[int]] = {}
    end = 0
    for array in _arrays(facts):
        offsets.setdefault(array.key, []).append(end)
        end += -(-array.size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _contents(model: Gemma3, vocabulary: PackedVocabulary, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """Yield the contents of the arrays in their order."""
    size = model.config.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    yield torch.stack([model.config.rope(kind)[0] ** -exponents for kind in _KINDS]).numpy()
    yield from (vocabulary.token_starts, vocabulary.byte_tokens, vocabulary.added_starts)
    yield from (vocabulary.characters, vocabulary.merges, vocabulary.added_tokens)
    for text in (vocabulary.token_texts, vocabulary.added_texts):
        yield np.frombuffer(text, np.uint8)
    yield _gain(model.norm)
    yield from _rounded(model.embedding.weight, dtype)
    for block in model.blocks:
        assert isinstance(block, Block)
        for name in _NORMS:
            yield _gain(getattr(block if hasattr(block, name) else block.attention, name))
        for name in _MATRICES:
            owner = block.attention if hasattr(block.attention, name) else block.mlp
            yield from _rounded(getattr(owner, name).weight, dtype)
    if model.head is not None:
        yield from _rounded(model.head.weight, dtype)


def _gain(norm: RMSNorm) -> npt.NDArray[np.float32]:
    return (1 + norm.weight.detach().float()).cpu().numpy()


def _rounded(weight: Tensor, dtype: str) -> Iterator[npt.NDArray[Any]]:
    held = weight.detach().cpu()
    if dtype == "int8":
        for part in round_rows(held):
            yield part.numpy()
    elif dtype == "bf16":
        yield held.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)
    else:
        yield held.float().numpy()


# ---- reading ----


def _read(path: Path) -> tuple[dict[str, Any], memoryview]:
    """Return the header and the bytes after it; ModelError where the checksum does not fit."""
    if path_kind(path, ModelError) is None:
        raise ModelError(f"{path}: no such file; `gemmule export --to c` writes a packed file")
    try:
        with path.open("rb") as file:
            start, length = _find(file)
            file.seek(start)
            beginning = file.read(min(length, _BEGINNING.size))
            size, header = _check_beginning(path, beginning, length)
            hashed = hashlib.sha256(beginning[_HASHED:])
            content = bytearray(size - len(beginning))
            if file.readinto(content) != len(content):
                raise ModelError(f"{path}: is truncated: it is shorter than it was a moment ago")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    hashed.update(content)
    if hashed.digest() != beginning[_HASHED - 32 : _HASHED]:
        raise _damaged(path, "its SHA-256 is not that of its content; make it again")
    try:
        text = content[:header].decode("ascii")
        facts = json.loads(text)
        canonical = isinstance(facts, dict) and _encode_header(facts) == content[:header]
    except (ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise _damaged(path, "its header is not JSON as this format has it")
    return facts, memoryview(content)[header:]


def _find(file: IO[bytes]) -> tuple[int, int]:
    """Return where a packed file begins in a file, and its length: at the end of a program, or the whole of it."""
    whole = file.seek(0, 2)
    file.seek(max(0, whole - TRAILER.size))
    tail = file.read()
    if len(tail) == TRAILER.size:
        length, magic = TRAILER.unpack(tail)
        if magic == MAGIC and _BEGINNING.size <= length <= whole - TRAILER.size:
            return whole - TRAILER.size - length, length
    return 0, whole


def _check_beginning(path: Path, beginning: bytes, length: int) -> tuple[int, int]:
    """Return how many bytes file and header have."""
    if beginning[:8] != MAGIC[: len(beginning)] or not beginning:
        raise ModelError(f"{path}: is not a packed file, which begins with {MAGIC.decode()}")
    if len(beginning) < _BEGINNING.size:
        raise ModelError(f"{path}: is truncated: it has {length} bytes")
    _, version, zero, _, size, header = _BEGINNING.unpack(beginning)
    if version != VERSION or zero:
        raise ModelError(f"{path}: is a packed file of version {version}; this Gemmule reads version {VERSION}")
    if size > length:
        raise ModelError(f"{path}: is truncated: it has {length} of {size} bytes")
    if size < length:
        raise _damaged(path, f"it has {length} bytes, {length - size} more than it says")
    if header % ALIGNMENT or not 0 < header <= min(size - _BEGINNING.size, _LARGEST_HEADER):
        raise _damaged(path, f"its header cannot have {header} bytes")
    return size, header


def _digest(path: Path) -> bytes:
    """Return the SHA-256 of a packed file's content from _HASHED on."""
    with path.open("rb") as file:
        file.seek(_HASHED)
        return hashlib.file_digest(file, "sha256").digest()


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path}: is damaged: {reason}")


def _vocabulary(facts: Mapping[str, Any], found: Mapping[str, list[npt.NDArray[Any]]]) -> PackedVocabulary:
    entries: dict[str, Any] = {key: found[key][0] for key in PackedVocabulary._fields if key not in _IDS}
    entries |= {key: entries[key].tobytes() for key in ("token_texts", "added_texts")}
    entries |= {key: facts[key] for key in _IDS} | {"stops": tuple(facts["stops"])}
    return PackedVocabulary(**entries)


def _model(config: Gemma3Config, facts: Mapping[str, Any], found: Mapping[str, list[npt.NDArray[Any]]]) -> Gemma3:
    """Return the model in fp32.

    Where the embedding's scale is that of another dtype, the embedding has the ratio in it and the head is of its own.
    """
    ratio = facts["embedding_scale"] / float(np.float32(math.sqrt(config.hidden_size)))
    tied = config.tie_word_embeddings
    state = {"norm.weight": _tensor(found, "norm", 0) - 1, "embedding.weight": _tensor(found, "embedding", 0)}
    if not tied or ratio != 1:
        state["head.weight"] = _tensor(found, "embedding" if tied else "head", 0)
        state["embedding.weight"] = state["embedding.weight"] * ratio
    for layer in range(config.num_hidden_layers):
        for key in _NORMS:
            owner = "attention." if key in _HEAD_NORMS else ""
            state[f"blocks.{layer}.{owner}{key}.weight"] = _tensor(found, key, layer) - 1
        for key in _MATRICES:
            owner = "mlp" if key in _MLP else "attention"
            state[f"blocks.{layer}.{owner}.{key}.weight"] = _tensor(found, key, layer)
    model = meta_model(config.model_copy(update={"tie_word_embeddings": "head.weight" not in state}))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _tensor(found: Mapping[str, list[npt.NDArray[Any]]], key: str, index: int) -> Tensor:
    """Return an array in fp32, int8 times its scales."""
    held = found[key][index]
    if held.dtype == np.uint16:
        return torch.from_numpy(held.view(np.int16)).view(torch.bfloat16).float()
    tensor = torch.from_numpy(held).float()
    scales = found.get(f"{key}_scales")
    return tensor if scales is None else tensor * torch.from_numpy(scales[index])[:, None]
