"""config.json, in both of transformers' dialects, and the reading and writing of JSON files in a model folder."""

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from gemmule.errors import ModelError, RecipeError
from gemmule.model.config import Gemma3Config
from gemmule.recipe import check_recipe
from gemmule.tokenizer import Tokenizer

# Our names that are Hugging Face's too, and mean the same.
SHARED_KEYS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "query_pre_attn_scalar", "sliding_window", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "initializer_range", "attention_dropout",
]  # fmt: skip

# What transformers takes where a config.json leaves a key out, as Google's for the 4B, 12B and 27B do; the keys not
# listed have the same default as ours.
ABSENT = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096, "max_position_embeddings": 131_072,
}  # fmt: skip

# No published model has a size near it, and up to here the sizes of a tensor multiply without overflow.
LARGEST_SIZE = 1 << 20

LIMITED_KEYS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "query_pre_attn_scalar", "sliding_window",
}  # fmt: skip

# Choices that transformers' code for Gemma 3 leaves open and Gemma 3 does not.
SETTLED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def write_config(config: Gemma3Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return config.json with the rotary settings in both dialects, transformers' before and since version 5."""
    factor = config.rope_scaling_factor
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else None
    layer_types = ["full_attention" if kind == "global" else "sliding_attention" for kind in config.layer_kinds]
    table = {key: getattr(config, key) for key in SHARED_KEYS} | SETTLED
    table |= {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dropout": config.dropout,
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_base_freq,
        "rope_scaling": scaling,
        "sliding_window_pattern": config.sliding_window_pattern,
        "rope_parameters": {
            "full_attention": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
            "sliding_attention": {"rope_theta": config.rope_local_base_freq, "rope_type": "default"},
        },
        "layer_types": layer_types,
    }
    if tokenizer is not None:
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        table |= {f"{name}_token_id": number for name, number in ids.items()}
    return table


def read_config(table: dict[str, Any], origin: Path) -> Gemma3Config:
    """Read a Gemma 3 config.json in either dialect; ModelError where it is another architecture or impossible.

    Of a multimodal model's it is the `text_config`.
    """
    if text := _section(table, "text_config", origin):
        # Whether the head is tied is said of the whole model, where it is said.
        outer = table.get("tie_word_embeddings")
        table = text if outer is None else text | {"tie_word_embeddings": outer}
    if table.get("model_type") != "gemma3_text":
        kind = reprlib.repr(table.get("model_type"))
        raise ModelError(f"{origin}: model_type is {kind}; Gemmule opens 'gemma3_text' models")
    for key, only in SETTLED.items():
        if table.get(key) not in (only, None):
            raise ModelError(f"{origin}: {key} is {reprlib.repr(table[key])}; for Gemma 3 it is {only!r}")
    table = ABSENT | table
    known = _read_rotary(table, origin) | {
        "dropout": table.get("dropout"),
        "sliding_window_pattern": _pattern(table, origin),
        **{key: table.get(key) for key in SHARED_KEYS},
    }
    _check_values(known, origin)
    try:
        return check_recipe({k: v for k, v in known.items() if v is not None}, Gemma3Config, "")
    except RecipeError as error:
        _, *problems = str(error).split("\n  ")
        raise ModelError(f"{origin}: {'; '.join(problems)}") from None


def _check_values(known: dict[str, Any], origin: Path) -> None:
    """Refuse what would cost time or memory before anything could be compared with the weights."""
    for key, value in known.items():
        if isinstance(value, str | list | dict):
            raise ModelError(f"{origin}: {key} is {reprlib.repr(value)}, neither a number nor true or false")
        if isinstance(value, int) and value > LARGEST_SIZE and key in LIMITED_KEYS:
            raise ModelError(f"{origin}: {key} is {reprlib.repr(value)}; the largest that is opened is {LARGEST_SIZE}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{origin}: {key} is {value}, not a finite number")


def _read_rotary(table: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Read the rotary settings: one table a kind of layer since transformers 5, loose keys before."""
    rope = _section(table, "rope_parameters", origin)
    local, full = _section(rope, "sliding_attention", origin), _section(rope, "full_attention", origin)
    scaling = full if rope else _section(table, "rope_scaling", origin)
    for scales, kinds in ((local, ("default",)), (scaling, ("default", "linear"))):
        kind = scales.get("rope_type", scales.get("type", "default"))
        if kind not in kinds:
            allowed = " or ".join(map(repr, kinds))
            raise ModelError(f"{origin}: rotary scaling is {reprlib.repr(kind)}; for Gemma 3 it is {allowed}")
    linear = scaling.get("rope_type", scaling.get("type")) == "linear"
    if linear and scaling.get("factor") is None:
        raise ModelError(f"{origin}: rotary scaling is 'linear' without a factor")
    return {
        "rope_theta": full.get("rope_theta", table.get("rope_theta")),
        "rope_local_base_freq": local.get("rope_theta", table.get("rope_local_base_freq")),
        "rope_scaling_factor": scaling["factor"] if linear else None,
    }


def _section(table: dict[str, Any], key: str, origin: Path) -> dict[str, Any]:
    section = table.get(key) or {}
    if not isinstance(section, dict):
        raise ModelError(f"{origin}: {key} is {reprlib.repr(section)}, not an object")
    return section


def _pattern(table: dict[str, Any], origin: Path) -> Any:
    """Find n such that every n-th layer is global, from the list of layer types where there is one."""
    types, count, declared = table.get("layer_types"), table["num_hidden_layers"], table.get("sliding_window_pattern")
    if not types:
        return declared
    if not isinstance(types, list) or len(types) != count:
        shown = reprlib.repr(types)
        raise ModelError(f"{origin}: layer_types {shown} do not name num_hidden_layers = {reprlib.repr(count)} layers")
    if "full_attention" in types:
        every = types.index("full_attention") + 1
    else:
        every = declared if isinstance(declared, int) and declared > count else count + 1
    expected = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    if types != expected:
        shown = reprlib.repr(types)
        raise ModelError(f"{origin}: layer_types {shown} are not a repeating pattern of local layers and one global")
    return every


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object; ModelError names it where it does not."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder has config.json and model.safetensors") from None
    except RecursionError:
        raise ModelError(f"{path}: cannot be read: nested too deeply") from None
    except (OSError, ValueError) as error:  # not JSON, not UTF-8, a number of thousands of digits
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return table


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
