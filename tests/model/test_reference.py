"""The readable twin and the real model are one function."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gemmule.model.attention import KERNELS
from gemmule.model.reference import reference_logits
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

# Rounding makes up to 6e-6 of these weights. Seed 0 has a token whose branch is nearly nothing before the norm after it
# makes it large, rounding and all, and there the two differ by 2e-5 and each from fp64 by as much.
SEED = 1

SHAPES: dict[str, dict[str, Any]] = {
    "both kinds of layer": {},
    "the real pattern": {"num_hidden_layers": 7, "sliding_window_pattern": 6},
    "all local": {"sliding_window_pattern": 8},
    "all global": {"sliding_window_pattern": 1},
    "scaling by 8": {"rope_scaling_factor": 8.0},
    "without scaling": {"rope_scaling_factor": 1.0},
    "other bases": {"rope_theta": 3000.0, "rope_local_base_freq": 50.0},
    "scalar of the head": {"query_pre_attn_scalar": 8},
    "untied": {"tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1},
    "as many key as query heads": {"num_key_value_heads": 4},
    "window of one": {"sliding_window": 1},
    "window longer than the text": {"sliding_window": 40},
    "odd epsilon": {"rms_norm_eps": 0.1},
}


@cache
def logits_of_the_twin(shape: str) -> Tensor:
    """Return the twin's logits, which no kernel changes."""
    model = lively_model(tiny_config(**SHAPES[shape]), seed=SEED)
    rows = some_tokens(model.config).tolist()
    return torch.stack([reference_logits(model.state_dict(), model.config, row) for row in rows])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_model_is_what_the_readable_twin_says(shape: str, kernel: str) -> None:
    model = lively_model(tiny_config(**SHAPES[shape]), kernel, SEED)
    with torch.no_grad():
        logits = model(some_tokens(model.config))
    assert 0.3 < logits.std() < 3
    assert greatest_difference(logits, logits_of_the_twin(shape)) <= 1e-5


def test_readable_twin_computes_weights_of_any_dtype_in_fp32() -> None:
    model = lively_model(tiny_config(), seed=SEED).bfloat16()
    tokens = some_tokens(model.config, rows=1)
    logits = reference_logits(model.state_dict(), model.config, tokens[0].tolist())
    assert logits.dtype == torch.float32
    with torch.no_grad():
        assert greatest_difference(logits, model.float()(tokens)[0]) <= 1e-5
