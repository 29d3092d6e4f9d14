"""The model folder, as Hugging Face lays it out: config.json, model.safetensors, tokenizer.json and their kin."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemmule.errors import ModelError
from gemmule.formats.names import foreign_names
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer

# Our names that are Hugging Face's too, and mean the same.
SHARED_KEYS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "query_pre_attn_scalar", "sliding_window", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "initializer_range", "attention_dropout",
]  # fmt: skip


def write_config(config: Gemma3Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return config.json with the rotary settings in both dialects, transformers' before and since version 5."""
    factor = config.rope_scaling_factor
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else None
    layer_types = ["full_attention" if kind == "global" else "sliding_attention" for kind in config.layer_kinds]
    table = {key: getattr(config, key) for key in SHARED_KEYS} | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
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
    """Read a Gemma 3 config.json in either dialect; ModelError where it is another architecture or not complete."""
    table = table.get("text_config", table)
    if table.get("model_type") != "gemma3_text":
        raise ModelError(f"{origin}: model_type is {table.get('model_type')!r}; Gemmule opens 'gemma3_text' models")
    if table.get("attention_bias") or table.get("final_logit_softcapping") or table.get("attn_logit_softcapping"):
        raise ModelError(f"{origin}: has attention biases or soft-capped logits, which Gemma 3 does not have")
    rope = table.get("rope_parameters") or {}
    local, full = rope.get("sliding_attention", {}), rope.get("full_attention", {})
    scaling = full if rope else table.get("rope_scaling") or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ModelError(f"{origin}: rotary scaling {kind!r} is not Gemma 3's; 'default' and 'linear' are")
    known = {
        "dropout": table.get("dropout"),
        "rope_theta": full.get("rope_theta", table.get("rope_theta")),
        "rope_local_base_freq": local.get("rope_theta", table.get("rope_local_base_freq")),
        "rope_scaling_factor": scaling.get("factor"),
        "sliding_window_pattern": _pattern(table, origin),
    } | {key: table.get(key) for key in SHARED_KEYS}
    try:
        config = Gemma3Config.model_validate({key: value for key, value in known.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{origin}: {first['loc'][0]} = {first['input']!r}: {first['msg'].lower()}") from None
    for problem in config.problems():
        raise ModelError(f"{origin}: {problem}")
    return config


def _pattern(table: dict[str, Any], origin: Path) -> int | None:
    """Find n such that every n-th layer is global, from the list of layer types where there is one."""
    types = table.get("layer_types")
    if not types:
        return table.get("sliding_window_pattern")
    first = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
    expected = ["full_attention" if (i + 1) % first == 0 else "sliding_attention" for i in range(len(types))]
    if types != expected:
        raise ModelError(f"{origin}: layer_types {types} are not a repeating pattern of local layers and one global")
    return int(table.get("sliding_window_pattern") or first) if first > len(types) else first


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
                found[wanted[name]] = file.get_tensor(name)
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
