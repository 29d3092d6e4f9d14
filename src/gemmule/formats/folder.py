"""The model folder, as Hugging Face lays it out: config.json, model.safetensors, tokenizer.json and their kin."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemmule.errors import ModelError, RecipeError
from gemmule.formats.names import foreign_names
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
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
    """Read a Gemma 3 config.json in either dialect; ModelError where it is another architecture or impossible."""
    table = _section(table, "text_config", origin) or table
    if table.get("model_type") != "gemma3_text":
        raise ModelError(f"{origin}: model_type is {table.get('model_type')!r}; Gemmule opens 'gemma3_text' models")
    for key, only in SETTLED.items():
        if table.get(key) not in (only, None):
            raise ModelError(f"{origin}: {key} is {table[key]!r}; for Gemma 3 it is {only!r}")
    table = ABSENT | table
    known = _read_rotary(table, origin) | {
        "dropout": table.get("dropout"),
        "sliding_window_pattern": _pattern(table, origin),
        **{key: table.get(key) for key in SHARED_KEYS},
    }
    try:
        return check_recipe({k: v for k, v in known.items() if v is not None}, Gemma3Config, str(origin))
    except RecipeError as error:
        raise ModelError(str(error).removeprefix("recipe ")) from None


def _read_rotary(table: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Read the rotary settings: one table a kind of layer since transformers 5, loose keys before."""
    rope = _section(table, "rope_parameters", origin)
    local, full = _section(rope, "sliding_attention", origin), _section(rope, "full_attention", origin)
    scaling = full if rope else _section(table, "rope_scaling", origin)
    for scales, kinds in ((local, ("default",)), (scaling, ("default", "linear"))):
        kind = scales.get("rope_type", scales.get("type", "default"))
        if kind not in kinds:
            raise ModelError(f"{origin}: rotary scaling is {kind!r}; for Gemma 3 it is {' or '.join(map(repr, kinds))}")
    return {
        "rope_theta": full.get("rope_theta", table.get("rope_theta")),
        "rope_local_base_freq": local.get("rope_theta", table.get("rope_local_base_freq")),
        "rope_scaling_factor": scaling.get("factor"),
    }


def _section(table: dict[str, Any], key: str, origin: Path) -> dict[str, Any]:
    section = table.get(key) or {}
    if not isinstance(section, dict):
        raise ModelError(f"{origin}: {key} is {section!r}, not an object")
    return section


def _pattern(table: dict[str, Any], origin: Path) -> Any:
    """Find n such that every n-th layer is global, from the list of layer types where there is one."""
    types, count, declared = table.get("layer_types"), table["num_hidden_layers"], table.get("sliding_window_pattern")
    if not types:
        return declared
    if not isinstance(types, list) or len(types) != count:
        raise ModelError(f"{origin}: layer_types {types} do not name num_hidden_layers = {count!r} layers")
    if "full_attention" in types:
        every = types.index("full_attention") + 1
    else:
        every = declared if isinstance(declared, int) and declared > count else count + 1
    expected = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    if types != expected:
        raise ModelError(f"{origin}: layer_types {types} are not a repeating pattern of local layers and one global")
    return every


def save_folder(model: Gemma3, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer into an existing folder; transformers, vLLM and `load_folder` open it."""
    config, state = model.config, model.state_dict()
    tensors = {
        theirs: state[ours].detach().cpu().contiguous()
        for ours, theirs in foreign_names(config.num_hidden_layers, config.tie_word_embeddings)
    }
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ends = [i for i in (tokenizer.eos_id, tokenizer.end_of_turn_id) if i is not None]
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    _write_json(folder / "config.json", write_config(config, tokenizer) | {"dtype": dtype, "torch_dtype": dtype})
    _write_json(folder / "generation_config.json", generation | {"do_sample": True})
    tokenizer.save(folder)


def load_folder(folder: Path, kernel: str = "sdpa") -> tuple[Gemma3, Tokenizer]:
    """Open a model folder, every tensor used exactly once; ModelError names what is missing, left over or misshapen."""
    config = read_config(_read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        model = Gemma3(config, kernel)
    model.load_state_dict(read_tensors(folder, model), assign=True)
    return model.eval(), Tokenizer.load(folder)


def read_tensors(folder: Path, model: Gemma3) -> dict[str, Tensor]:
    """Read the weights of a folder under our names, checked against the model's shapes."""
    config = model.config
    wanted = {theirs: ours for ours, theirs in foreign_names(config.num_hidden_layers, config.tie_word_embeddings)}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    spare: list[str] = []
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name not in wanted:
                    spare.append(name)
                    continue
                tensor = file.get_tensor(name)
                # Gemma 3's residual stream exceeds fp16's range, so what was stored so is computed in fp32.
                found[wanted[name]] = tensor.float() if tensor.dtype == torch.float16 else tensor
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder has config.json and model.safetensors") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged or not a safetensors file: {error}") from None
    gaps = [theirs for theirs, ours in wanted.items() if ours not in found]
    wrong = [
        f"{name} is {list(t.shape)}, not {list(shapes[name])}" for name, t in found.items() if t.shape != shapes[name]
    ]
    for what, names in (("lacks", gaps), ("has also", spare), ("does not fit config.json:", wrong)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(f"{path}: {what} {shown}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder has config.json and model.safetensors") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return table


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
