"""Read and write Gemma 3 as a GGUF file, for llama.cpp, Ollama and LM Studio.

Norms are stored as 1 + weight, in fp32. llama.cpp scales queries by 1/sqrt(head_dim), whatever query_pre_attn_scalar
is, so for another value the query norms are scaled by the ratio.
"""

import logging
import math
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemmule.errors import ModelError, TokenizerError
from gemmule.files import atomic_write
from gemmule.formats.config_json import check_config
from gemmule.formats.gguf_file import GgufFile, library
from gemmule.formats.gguf_tokenizer import read_vocabulary, write_vocabulary
from gemmule.formats.model_card import NO_CARD, ModelCard
from gemmule.formats.names import GGUF, tensor_name_pairs
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import meta_model
from gemmule.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Types that the gguf library quantizes to; llama.cpp writes K-quants (`k_quants.py`).
DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")

# Our setting -> (GGUF key without "gemma3.", its default, or REQUIRED).
REQUIRED = None
_KEYS: dict[str, tuple[str, int | float | None]] = {
    "max_position_embeddings": ("context_length", REQUIRED),
    "hidden_size": ("embedding_length", REQUIRED),
    "num_hidden_layers": ("block_count", REQUIRED),
    "intermediate_size": ("feed_forward_length", REQUIRED),
    "num_attention_heads": ("attention.head_count", REQUIRED),
    "num_key_value_heads": ("attention.head_count_kv", REQUIRED),
    "head_dim": ("attention.key_length", 256),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", 1e-6),
    "sliding_window": ("attention.sliding_window", REQUIRED),
    "sliding_window_pattern": ("attention.sliding_window_pattern", 6),
    "rope_theta": ("rope.freq_base", 1_000_000.0),
    "rope_local_base_freq": ("rope.freq_base_swa", 10_000.0),
}
# Ollama's key -> llama.cpp's key.
_SYNONYMS = {"rope.global.freq_base": "rope.freq_base", "rope.local.freq_base": "rope.freq_base_swa"}
# Known keys without an effect on Gemma 3's logits, or without one of their own.
_HARMLESS = {
    "vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length",
}  # fmt: skip
# Prefixes of the vision encoder, in Ollama's files of multimodal models.
_VISION_KEYS = ("vision.", "mm.")
_VISION_TENSORS = ("v.", "mm.")
# RoPE scaling of Google's multimodal models, which Ollama's files of them omit.
_MULTIMODAL_FACTOR, _MULTIMODAL_CONTEXT = 8.0, 131_072
# llama.cpp treats any model with this many layers as the 27B, and scales queries by 1/sqrt(width / heads).
_LAYERS_OF_27B = 62


def load_gguf(path: Path, kernel: str = "sdpa", dtype: torch.dtype = torch.float32) -> tuple[Gemma3, Tokenizer]:
    """Load model and tokenizer from a GGUF file: weights dequantized, every tensor used exactly once.

    The skipped vision encoder of a multimodal model is logged. ModelError or TokenizerError names what is missing,
    unexpected, misshapen, of another architecture, or unsupported.
    """
    with GgufFile(path) as file:
        tokenizer = _tokenizer(file)
        vision = [name for name in file.tensors if name.startswith(_VISION_TENSORS)]
        for name in vision:
            del file.tensors[name]
        model = meta_model(read_config(file), kernel)
        model.load_state_dict(_read_tensors(file, model, dtype), assign=True)
        if vision:
            total = len(vision) + len(file.tensors)
            log.info(f"skipped the vision encoder, {len(vision)} of {total} tensors; Gemmule loads the text model")
    return model.eval(), tokenizer


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """Load only the tokenizer of a GGUF file."""
    with GgufFile(path) as file:
        return _tokenizer(file)


def read_config(file: GgufFile) -> Gemma3Config:
    """Read the model config from the metadata of a GGUF file; ModelError names an unsupported key."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "gemma3":
        raise ModelError(f"{file.path}: general.architecture is {architecture!r:.80}, not 'gemma3'")
    keys = {key.removeprefix("gemma3."): value for key, value in file.metadata.items() if key.startswith("gemma3.")}
    given = keys | {ours: keys[theirs] for theirs, ours in _SYNONYMS.items() if theirs in keys and ours not in keys}
    values = {ours: given.get(key, default) for ours, (key, default) in _KEYS.items()}
    missing = [f"gemma3.{_KEYS[ours][0]}" for ours, value in values.items() if value is None]
    if missing:
        raise ModelError(f"{file.path}: the metadata lack {', '.join(missing)}")
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: lacks token_embd.weight")
    values |= {
        "sliding_window_pattern": _pattern(values["sliding_window_pattern"], values["num_hidden_layers"], file.path),
        "rope_scaling_factor": _scaling(given, file.path),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    # A file written from fp32 has 9.999999974752427e-07 where 1e-06 was meant.
    values = {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in values.items()}
    config = check_config(values | {"query_pre_attn_scalar": 1}, file.path)
    _refuse_unknown(given, config.head_dim, file.path)
    if config.num_hidden_layers > len(file.tensors):
        raise ModelError(
            f"{file.path}: gemma3.block_count is {config.num_hidden_layers}, but there are {len(file.tensors)} tensors"
        )
    return config.replace(query_pre_attn_scalar=_llama_query_scalar(config))


def _pattern(value: Any, layers: Any, path: Path) -> Any:
    """Return the sliding-window pattern n (every n-th layer is global), also from a list of booleans (local or not)."""
    if not isinstance(value, list):
        return value
    every = value.index(False) + 1 if False in value else len(value) + 1
    if len(value) != layers or value != [(layer + 1) % every != 0 for layer in range(len(value))]:
        pattern = f"a repeating pattern of local layers and one global layer for {layers!r} layers"
        raise ModelError(f"{path}: gemma3.attention.sliding_window_pattern is {reprlib.repr(value)}, not {pattern}")
    return every


def _scaling(given: Mapping[str, Any], path: Path) -> Any:
    """Return the RoPE scaling factor of global layers.

    As in llama.cpp, scaling is linear unless its type says otherwise, and a missing or zero factor means none.
    """
    factor = given.get("rope.scaling.factor", 0)
    kind = given.get("rope.scaling.type", "linear" if factor else "none")
    if kind not in ("none", "linear"):
        raise ModelError(f"{path}: gemma3.rope.scaling.type is {kind!r:.80}; Gemma 3 has 'none' or 'linear'")
    unstated = "rope.scaling.type" not in given and not factor and given.get("context_length") == _MULTIMODAL_CONTEXT
    if unstated and any(key.startswith(_VISION_KEYS) for key in given):
        log.info(
            f"{path}: has no RoPE scaling factor; {_MULTIMODAL_FACTOR:g} is used, as in Google's multimodal models"
        )
        return _MULTIMODAL_FACTOR
    return factor if kind == "linear" and factor else 1.0


def _refuse_unknown(given: Mapping[str, Any], head_dim: int, path: Path) -> None:
    """Refuse an unsupported key that could change the logits, unless it is zero, false or empty."""
    known = {key for key, _ in _KEYS.values()} | _HARMLESS | set(_SYNONYMS)
    # Keys whose value follows from others in every Gemma 3.
    implied = {"attention.causal": True, "rope.scaling.attn_factor": 1.0} | dict.fromkeys(
        ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count",
         "rope.dimension_count_swa"), head_dim
    )  # fmt: skip
    for key, value in given.items():
        if key in known or key.startswith(_VISION_KEYS):
            continue
        if key in implied:
            if value != implied[key]:
                message = f"is {reprlib.repr(value)}; Gemmule supports only {implied[key]!r:.80}"
                raise ModelError(f"{path}: gemma3.{key!s:.80} {message}")
        elif value:
            message = f"is {reprlib.repr(value)}, which could change the logits; Gemmule does not support this key"
            raise ModelError(f"{path}: gemma3.{key!s:.80} {message}")


def _llama_query_scalar(config: Gemma3Config) -> int:
    """Return the query_pre_attn_scalar that llama.cpp assumes."""
    wide = config.num_hidden_layers == _LAYERS_OF_27B
    return config.hidden_size // config.num_attention_heads if wide else config.head_dim


def _tokenizer(file: GgufFile) -> Tokenizer:
    try:
        return read_vocabulary(file.metadata)
    except TokenizerError as error:
        raise TokenizerError(f"{file.path}: {error}") from None


def _read_tensors(file: GgufFile, model: Gemma3, dtype: torch.dtype) -> dict[str, Tensor]:
    config = model.config
    wanted = {
        theirs: ours for ours, theirs in tensor_name_pairs(config.num_hidden_layers, config.tie_word_embeddings, GGUF)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in file.tensors]
    unexpected = [name for name in file.tensors if name not in wanted]
    wrong = [
        f"{name} is {list(info.shape)}, not {list(shapes[wanted[name]])}"
        for name, info in file.tensors.items()
        if name in wanted and info.shape != shapes[wanted[name]]
    ]
    for what, names in (
        ("lacks", missing),
        ("has unexpected tensors:", unexpected),
        ("does not fit its metadata:", wrong),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(f"{file.path}: {what} {shown}")
    found: dict[str, Tensor] = {}
    for theirs, ours in wanted.items():
        tensor = torch.from_numpy(file.read(theirs))
        found[ours] = (tensor - 1 if tensor.ndim == 1 else tensor).to(dtype)
    return found


class _FileData(np.ndarray[Any, Any]):
    """An array written by the file object, because NumPy's tofile drops the cause of an OSError."""

    def tofile(self, fid: Any, sep: str = "", format: str = "") -> None:  # noqa: A002, ARG002 - NumPy's names
        """Write all bytes."""
        fid.write(self.data.cast("B"))


def save_gguf(
    model: Gemma3,
    tokenizer: Tokenizer,
    path: Path,
    dtype: str,
    card: ModelCard = NO_CARD,
) -> None:
    """Write a model as one GGUF file; tensors whose rows do not divide into blocks of `dtype` stay in f32.

    Those tensors are logged. Embedding rows beyond the tokenizer's vocabulary are dropped, as in the official files.
    """
    gguf = library()
    vocabulary = write_vocabulary(tokenizer)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ModelError(f"the model has {model.config.vocab_size} rows for {tokenizer.vocab_size} tokens")
    unquantized: list[str] = []
    with atomic_write(path) as temporary, closing(gguf.GGUFWriter(temporary, "gemma3")) as writer:
        name = (card.name or path.stem).encode(errors="replace").decode()  # of a path that need not be UTF-8
        general = {"general.type": "model", "general.name": name, "general.license": card.license}
        keys = {key: value for key, value in general.items() if value is not None}
        _write_metadata(writer, keys | metadata_of(model.config) | vocabulary, dtype)
        kinds = {}
        for name, tensor in _gguf_tensors(model, tokenizer.vocab_size):
            kinds[name] = kind = _storage(tensor, dtype)
            if kind.name != dtype.upper() and tensor.ndim > 1:
                unquantized.append(name)
            elements, bytes_ = gguf.GGML_QUANT_SIZES[kind]
            size = tensor.numel() // elements * bytes_
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _gguf_tensors(model, tokenizer.vocab_size):
            data = gguf.quants.quantize(tensor.contiguous().numpy(), kinds[name])
            writer.write_tensor_data(np.ascontiguousarray(data).view(_FileData))
    if unquantized:
        log.info(f"kept in f32, because {dtype} needs rows in multiples of 32: {', '.join(unquantized[:3])} ...")


def metadata_of(config: Gemma3Config) -> dict[str, Any]:
    """Return the gemma3.* keys of a config, llama.cpp's defaults included."""
    values = {key: getattr(config, ours) for ours, (key, _) in _KEYS.items()}
    # Integers have 32 bits in GGUF.
    keys = {f"gemma3.{key}": min(v, 2**31 - 1) if isinstance(v, int) else v for key, v in values.items()}
    keys["gemma3.attention.value_length"] = config.head_dim
    if config.rope_scaling_factor != 1:
        keys |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": config.rope_scaling_factor}
    return keys


def runtime_caveats(config: Gemma3Config) -> list[str]:
    """List the settings that older runtimes ignore, and what those compute instead."""
    newer = {
        "rope_local_base_freq": "use RoPE base 10,000 in local layers",
        "sliding_window_pattern": "treat every sixth layer as global",
    }
    return [
        f"{ours} = {getattr(config, ours)} is supported by llama.cpp since January 2026, and by programs built on it; "
        f"older versions {what}: update them, or check yours with --verify"
        for ours, what in newer.items()
        if getattr(config, ours) != _KEYS[ours][1]
    ]


def _gguf_tensors(model: Gemma3, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with GGUF's names and conventions, in fp32."""
    config, state = model.config, model.state_dict()
    fold = math.sqrt(_llama_query_scalar(config) / config.query_pre_attn_scalar)
    for ours, theirs in tensor_name_pairs(config.num_hidden_layers, config.tie_word_embeddings, GGUF):
        tensor = state[ours].detach().cpu().float()
        if tensor.ndim == 1:
            tensor = tensor + 1
        if ours.endswith("query_norm.weight"):
            tensor = tensor * fold
        yield theirs, tensor[:rows] if ours in ("embedding.weight", "head.weight") else tensor


def _storage(tensor: Tensor, dtype: str) -> Any:
    """Return the ggml type of a tensor: f32 for norms and for rows that do not divide into blocks."""
    kinds = library().GGMLQuantizationType
    kind = kinds[dtype.upper()]
    fits = tensor.ndim > 1 and tensor.shape[-1] % library().GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else kinds.F32


def _write_metadata(writer: Any, keys: Mapping[str, Any], dtype: str) -> None:
    writer.add_file_type(library().LlamaFileType[("ALL_" if dtype == "f32" else "MOSTLY_") + dtype.upper()])
    writer.add_quantization_version(library().GGML_QUANT_VERSION)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
