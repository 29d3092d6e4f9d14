"""Gemma 3 as a GGUF file, both ways: what llama.cpp, Ollama and LM Studio run.

Norms are stored as 1 + weight, in fp32. llama.cpp scales queries by 1/sqrt(head_dim), whatever the model says, so a
model with another scalar is written with the difference folded into the query norms.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemmule.errors import ModelError, RecipeError, TokenizerError
from gemmule.files import written_aside
from gemmule.formats.gguf_file import GgufFile, library
from gemmule.formats.gguf_tokenizer import read_vocabulary, write_vocabulary
from gemmule.formats.names import GGUF, foreign_names
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.initialise import unfilled
from gemmule.recipe import check_recipe
from gemmule.tokenizer import Tokenizer

# What the gguf library writes; K-quants are llama.cpp's (`k_quants.py`).
DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")

# Our setting -> (GGUF's key without "gemma3.", its value where the key is absent; REQUIRED where there is none).
REQUIRED = None
_KEYS: dict[str, tuple[str, int | float | None]] = {
    "max_position_embeddings": ("context_length", REQUIRED),
    "hidden_size": ("embedding_length", REQUIRED),
    "num_hidden_layers": ("block_count", REQUIRED),
    "intermediate_size": ("feed_forward_length", REQUIRED),
    "num_attention_heads": ("attention.head_count", REQUIRED),
    "num_key_value_heads": ("attention.head_count_kv", REQUIRED),
    "head_dim": ("attention.key_length", 256),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", REQUIRED),
    "sliding_window": ("attention.sliding_window", REQUIRED),
    "sliding_window_pattern": ("attention.sliding_window_pattern", 6),
    "rope_theta": ("rope.freq_base", 1_000_000.0),
    "rope_local_base_freq": ("rope.freq_base_swa", 10_000.0),
}
# llama.cpp takes any model of so many layers for the 27B, and scales its queries by 1/sqrt(width / heads).
_LAYERS_OF_27B = 62


def load_gguf(path: Path, kernel: str = "sdpa", dtype: torch.dtype = torch.float32) -> tuple[Gemma3, Tokenizer]:
    """Open a GGUF file: weights dequantised, every tensor used exactly once, the tokenizer rebuilt from its metadata.

    ModelError or TokenizerError says what is missing, left over, misshapen or of another architecture.
    """
    with GgufFile(path) as file:
        tokenizer = _tokenizer(file)
        model = unfilled(read_config(file), kernel)
        model.load_state_dict(_read_tensors(file, model, dtype), assign=True)
    return model.eval(), tokenizer


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """Open the tokenizer of a GGUF file alone."""
    with GgufFile(path) as file:
        return _tokenizer(file)


def read_config(file: GgufFile) -> Gemma3Config:
    """Return the configuration that a GGUF file's metadata describes."""
    given = file.metadata
    if given.get("general.architecture") != "gemma3":
        raise ModelError(f"{file.path}: general.architecture is {given.get('general.architecture')!r}, not 'gemma3'")
    values = {ours: given.get(f"gemma3.{key}", default) for ours, (key, default) in _KEYS.items()}
    gaps = [f"gemma3.{_KEYS[ours][0]}" for ours, value in values.items() if value is None]
    if gaps:
        raise ModelError(f"{file.path}: the metadata lack {', '.join(gaps)}")
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: lacks token_embd.weight")
    scaling = given.get("gemma3.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"{file.path}: gemma3.rope.scaling.type is {scaling!r}; for Gemma 3 it is 'none' or 'linear'")
    values |= {
        "rope_scaling_factor": given.get("gemma3.rope.scaling.factor", 1.0) if scaling == "linear" else 1.0,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    # A file written from fp32 has 9.999999974752427e-07 where 1e-06 was meant.
    values = {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in values.items()}
    try:
        config = check_recipe(values | {"query_pre_attn_scalar": 1}, Gemma3Config, str(file.path))
    except RecipeError as error:
        raise ModelError(str(error).removeprefix("recipe ")) from None
    if config.num_hidden_layers > len(file.tensors):
        told = f"{config.num_hidden_layers} layers, but there are {len(file.tensors)} tensors"
        raise ModelError(f"{file.path}: gemma3.block_count tells of {told}")
    return config.replace(query_pre_attn_scalar=_scalar_of_llama(config))


def _scalar_of_llama(config: Gemma3Config) -> int:
    """Return the number whose root llama.cpp divides queries by."""
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
        theirs: ours for ours, theirs in foreign_names(config.num_hidden_layers, config.tie_word_embeddings, GGUF)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    gaps = [name for name in wanted if name not in file.tensors]
    spare = [name for name in file.tensors if name not in wanted]
    wrong = [
        f"{name} is {list(info.shape)}, not {list(shapes[wanted[name]])}"
        for name, info in file.tensors.items()
        if name in wanted and info.shape != shapes[wanted[name]]
    ]
    for what, names in (("lacks", gaps), ("has also", spare), ("does not fit its metadata:", wrong)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(f"{file.path}: {what} {shown}")
    found: dict[str, Tensor] = {}
    for theirs, ours in wanted.items():
        tensor = torch.from_numpy(file.read(theirs))
        found[ours] = (tensor - 1 if tensor.ndim == 1 else tensor).to(dtype)
    return found


def save_gguf(model: Gemma3, tokenizer: Tokenizer, path: Path, dtype: str, say: Callable[[str], None]) -> None:
    """Write a model as one GGUF file; rows that no block of `dtype` fits stay in f32, which is said.

    Rows of the embedding beyond the tokenizer's vocabulary are left out, as in the official files.
    """
    gguf = library()
    vocabulary = write_vocabulary(tokenizer)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ModelError(f"the model has {model.config.vocab_size} rows for {tokenizer.vocab_size} tokens")
    odd: list[str] = []
    with written_aside(path) as aside, closing(gguf.GGUFWriter(aside, "gemma3")) as writer:
        _write_metadata(writer, metadata_of(model.config) | vocabulary, dtype)
        kinds = {}
        for name, tensor in _foreign_tensors(model, tokenizer.vocab_size):
            kinds[name] = kind = _storage(tensor, dtype)
            if kind.name != dtype.upper() and tensor.ndim > 1:
                odd.append(name)
            elements, bytes_ = gguf.GGML_QUANT_SIZES[kind]
            size = tensor.numel() // elements * bytes_
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _foreign_tensors(model, tokenizer.vocab_size):
            writer.write_tensor_data(gguf.quants.quantize(tensor.contiguous().numpy(), kinds[name]))
    if odd:
        say(f"{path}: kept in f32, because {dtype} needs rows of a multiple of 32: {', '.join(odd[:3])} ...")


def metadata_of(config: Gemma3Config) -> dict[str, Any]:
    """Return the gemma3.* keys of a configuration: all that llama.cpp needs, also where its default would do."""
    keys: dict[str, Any] = {f"gemma3.{key}": getattr(config, ours) for ours, (key, _) in _KEYS.items()}
    keys["gemma3.attention.value_length"] = config.head_dim
    if config.rope_scaling_factor != 1:
        keys |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": config.rope_scaling_factor}
    return keys


def lint(config: Gemma3Config) -> list[str]:
    """Say what a llama.cpp that does not know the newer keys would compute differently."""
    newer = {
        "rope_local_base_freq": "its local layers would turn by base 10,000",
        "sliding_window_pattern": "every sixth layer would be global",
    }
    return [
        f"gemma3.{_KEYS[ours][0]} = {getattr(config, ours)}: to a llama.cpp that does not know this key, {what}"
        for ours, what in newer.items()
        if getattr(config, ours) != _KEYS[ours][1]
    ]


def _foreign_tensors(model: Gemma3, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under GGUF's names and in its conventions, fp32."""
    config, state = model.config, model.state_dict()
    fold = math.sqrt(_scalar_of_llama(config) / config.query_pre_attn_scalar)
    for ours, theirs in foreign_names(config.num_hidden_layers, config.tie_word_embeddings, GGUF):
        tensor = state[ours].detach().cpu().float()
        if tensor.ndim == 1:
            tensor = tensor + 1
        if ours.endswith("query_norm.weight"):
            tensor = tensor * fold
        yield theirs, tensor[:rows] if ours in ("embedding.weight", "head.weight") else tensor


def _storage(tensor: Tensor, dtype: str) -> Any:
    """Return ggml's storage type for a tensor: norms, and rows that no block fits, stay in f32."""
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
