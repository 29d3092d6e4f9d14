"""Models for packed files, and packed files that somebody forged."""

import hashlib
import json
from typing import Any

from gemmule.inference.quantize import quantize
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "window 1": {"sliding_window": 1},
    "window 8": {"sliding_window": 8},
    "no window": {"sliding_window": 2**53},
    "one key head": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "factor 8": {"rope_scaling_factor": 8.0},
    "rows of odd lengths": {"hidden_size": 20, "intermediate_size": 37, "head_dim": 6},
    "all local": {"sliding_window_pattern": 9},
    "all global": {"sliding_window_pattern": 1},
    "more ids than 16 bits": {"vocab_size": 65_600, "hidden_size": 8, "intermediate_size": 8},
}


def model_of(**changes: Any) -> Gemma3:
    return lively_model(tiny_config(**{"vocab_size": 380} | changes))


def rounded(model: Gemma3, dtype: str) -> Gemma3:
    """Round the matrices of a model, which stays in fp32."""
    if dtype == "int8":
        return quantize(model)
    for parameter in model.parameters():
        if parameter.ndim > 1 and dtype == "bf16":
            parameter.data = parameter.data.bfloat16().float()
    return model


def forged(whole: bytes, **changes: Any) -> bytes:
    """Return the file with other entries in its header, and a checksum that fits."""
    length = int.from_bytes(whole[56:64], "little")
    header = json.loads(whole[64 : 64 + length]) | changes
    text = json.dumps({k: v for k, v in header.items() if v is not ...}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    rest = (64 + len(text) + len(whole) - 64 - length).to_bytes(8, "little") + len(text).to_bytes(8, "little")
    rest += text + whole[64 + length :]
    return whole[:16] + hashlib.sha256(rest).digest() + rest


def altered(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    """Return the tokenizer with other entries in its tokenizer.json; those of its model begin with `model_`."""
    description = json.loads(json.dumps(tokenizer.description))
    for key, value in changes.items():
        place = description["model"] if key.startswith("model_") else description
        place[key.removeprefix("model_")] = value
    return Tokenizer(json.dumps(description), tokenizer.config)
