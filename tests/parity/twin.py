"""The same weights in transformers, the reference of every test in this folder."""

from typing import Any

import pytest
import torch

from gemmule.formats.config_json import write_config
from gemmule.formats.names import tensor_name_pairs
from gemmule.model.gemma3 import Gemma3

transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed")

# For the `pytestmark` of each file here.
MARKS = [
    pytest.mark.slow,
    # Deprecations between torch and transformers are theirs to settle.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]

# The largest difference between fp32 logits of size 1.
TOLERANCE = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "both kinds of layer": {},
    "the real pattern": {"num_hidden_layers": 13, "sliding_window_pattern": 6},
    "untied": {"tie_word_embeddings": False},
    "without scaling": {"rope_scaling_factor": 1.0},
    "scaling by 8": {"rope_scaling_factor": 8.0},
    "scalar of the head": {"query_pre_attn_scalar": 8},
    "other bases": {"rope_theta": 3000.0, "rope_local_base_freq": 50.0},
    "window of one": {"sliding_window": 1},
    "window longer than the text": {"sliding_window": 40},
    "all local": {"sliding_window_pattern": 8},
    "all global": {"sliding_window_pattern": 1},
    "one key head": {"num_key_value_heads": 1},
    "as many key as query heads": {"num_key_value_heads": 4},
    "odd epsilon": {"rms_norm_eps": 0.1},
}


def twin_of(model: Gemma3) -> Any:
    """Build transformers' Gemma 3 from the settings that we write and a model's weights, in their dtype."""
    table = write_config(model.config, None)
    # They shall say themselves which layers are global.
    del table["layer_types"]
    # With an id for padding, their embedding keeps that row from learning.
    config = transformers.Gemma3TextConfig(**table | {"pad_token_id": None})
    # Their plainest attention; folders are opened with their default one.
    twin = transformers.AutoModelForCausalLM.from_config(
        config, dtype=model.embedding.weight.dtype, attn_implementation="eager"
    )
    state = model.state_dict()
    names = tensor_name_pairs(model.config.num_hidden_layers, model.config.tie_word_embeddings)
    loaded = twin.load_state_dict({theirs: state[ours] for ours, theirs in names}, strict=False)
    assert loaded.unexpected_keys == []
    assert loaded.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    assert all(torch.isfinite(parameter).all() for parameter in twin.parameters())
    return twin.eval()
