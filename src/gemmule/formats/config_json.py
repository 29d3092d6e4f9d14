"""config.json in both schema versions of transformers (4 and 5), and the JSON files of a model folder."""

import json
import reprlib
from pathlib import Path
from typing import Any

from gemmule.errors import ModelError, RecipeError
from gemmule.model.config import Gemma3Config
from gemmule.reading import IS_LFS_POINTER, is_lfs_pointer
from gemmule.settings import check_recipe
from gemmule.tokenizer import Tokenizer

# Keys with the same name and meaning in Hugging Face's config.
SHARED_KEYS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "query_pre_attn_scalar", "sliding_window", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "initializer_range", "attention_dropout",
]  # fmt: skip

# Defaults of transformers that differ from ours; Google's config.json of the 4B, 12B and 27B omits keys.
TRANSFORMERS_DEFAULTS = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096, "max_position_embeddings": 131_072,
}  # fmt: skip

# Options of transformers' Gemma 3 code that have one value in every Gemma 3.
FIXED_KEYS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def write_config(config: Gemma3Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the content of config.json, with the RoPE settings in the schemas of transformers 4 and 5."""
    factor = config.rope_scaling_factor
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else None
    layer_types = ["full_attention" if kind == "global" else "sliding_attention" for kind in config.layer_kinds]
    table = {key: getattr(config, key) for key in SHARED_KEYS} | FIXED_KEYS
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
    """Read a Gemma 3 config.json of either schema version; ModelError for another architecture or invalid values.

    For a multimodal model, `text_config` is read.
    """
    if text := _section(table, "text_config", origin):
        # Multimodal configs have this key outside of text_config.
        outer = table.get("tie_word_embeddings")
        table = text if outer is None else text | {"tie_word_embeddings": outer}
    if table.get("model_type") != "gemma3_text":
        kind = reprlib.repr(table.get("model_type"))
        raise ModelError(f"{origin}: model_type is {kind}; Gemmule opens 'gemma3_text' models")
    for key, only in FIXED_KEYS.items():
        if table.get(key) not in (only, None):
            raise ModelError(f"{origin}: {key} is {reprlib.repr(table[key])}; Gemma 3 has {only!r}")
    table = TRANSFORMERS_DEFAULTS | table
    known = _read_rotary(table, origin) | {
        "dropout": table.get("dropout"),
        "sliding_window_pattern": _pattern(table, origin),
        **{key: table.get(key) for key in SHARED_KEYS},
    }
    return check_config({k: v for k, v in known.items() if v is not None}, origin)


def check_config(values: dict[str, Any], origin: Path) -> Gemma3Config:
    """Validate the settings of a file; ModelError names every invalid value."""
    for key, value in values.items():
        if isinstance(value, str | list | dict):
            raise ModelError(f"{origin}: {key} is {reprlib.repr(value)}, not a number or a boolean")
        if isinstance(value, int) and abs(value) >= 1 << 64:
            raise ModelError(f"{origin}: {key} is {reprlib.repr(value)}, too large for the size of a model")
    try:
        return check_recipe(values, Gemma3Config, "")
    except RecipeError as error:
        _, *problems = str(error).split("\n  ")
        raise ModelError(f"{origin}: {'; '.join(problems)}") from None


def _read_rotary(table: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Read the RoPE settings: one table per layer type since transformers 5, top-level keys before."""
    rope = _section(table, "rope_parameters", origin)
    local, full = _section(rope, "sliding_attention", origin), _section(rope, "full_attention", origin)
    scaling = full if rope else _section(table, "rope_scaling", origin)
    for scales, kinds in ((local, ("default",)), (scaling, ("default", "linear"))):
        kind = scales.get("rope_type", scales.get("type", "default"))
        if kind not in kinds:
            allowed = " or ".join(map(repr, kinds))
            raise ModelError(f"{origin}: RoPE scaling is {reprlib.repr(kind)}; Gemma 3 has {allowed}")
    linear = scaling.get("rope_type", scaling.get("type")) == "linear"
    if linear and scaling.get("factor") is None:
        raise ModelError(f"{origin}: RoPE scaling is 'linear' without a factor")
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
    """Return the sliding-window pattern n (every n-th layer is global), from `layer_types` where present."""
    types, count, declared = table.get("layer_types"), table["num_hidden_layers"], table.get("sliding_window_pattern")
    if not types or type(count) is not int:  # refused by check_config
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
        raise ModelError(f"{origin}: layer_types {shown} do not repeat a pattern of local layers and one global layer")
    return every


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; ModelError names the file."""
    try:
        content = path.read_bytes()
        if is_lfs_pointer(content):
            raise ModelError(f"{path}: {IS_LFS_POINTER}")
        # Editors of some systems put a byte order mark first.
        table = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder has config.json and model.safetensors") from None
    except RecursionError:
        raise ModelError(f"{path}: cannot be read: nested too deeply") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, not UTF-8, a number of thousands of digits
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: not a JSON object")
    return table


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
