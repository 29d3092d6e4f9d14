"""Runs step.c, compiled with AddressSanitizer and UndefinedBehaviorSanitizer, over whatever could lead it astray.

    LD_PRELOAD=LIBASAN:LIBSTDC++ ASAN_OPTIONS=detect_leaks=0 XDG_CACHE_HOME=EMPTY python sanitized_steps.py [step.c]

The process dies with a report at the first access out of bounds and at the first undefined operation; it prints how
many steps were made. `test_sanitized.py` starts it.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from gemmule.inference.decode import prefill
from torch import Tensor

from gemmule.inference.kv_cache import BatchCache
from gemmule.inference.native import decoder as native
from gemmule.inference.native import library
from gemmule.inference.quantize import Int8, quantize
from gemmule.model.gemma3 import Gemma3
from tiny import lively_model, some_tokens, tiny_config

SANITIZE = ("-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
LENGTH, PROMPT = 40, 9

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "window 1": {"sliding_window": 1},
    "window beyond the text": {"sliding_window": 64},
    "untied": {"tie_word_embeddings": False},
    "three heads, one key head": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "head_dim 2": {"head_dim": 2, "num_attention_heads": 6, "num_key_value_heads": 3},
    "odd sizes": {"hidden_size": 20, "intermediate_size": 37, "head_dim": 6, "vocab_size": 51},
    "more than one block of int8": {"intermediate_size": 1037, "vocab_size": 703},
    "smallest": {
        "hidden_size": 1,
        "intermediate_size": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
    },
}
CONSTANTS: list[dict[str, Any]] = [
    {"rope_theta": 1e-300},
    {"rope_theta": 1e300},
    {"rope_local_base_freq": 1e-300},
    {"rope_scaling_factor": 1e300},
    {"rms_norm_eps": 1e-300},
    {"rms_norm_eps": 1e300},
    {"query_pre_attn_scalar": 10**300},
    {"sliding_window": 2**62},
    {"sliding_window": 10**30},
]
VALUES = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, -1e-45, 0.0]
PRECISIONS: dict[str, Callable[[Gemma3], Gemma3]] = {"fp32": Gemma3.float, "bf16": Gemma3.bfloat16, "int8": quantize}


def decoder(model: Gemma3, rows: int = 1, padding: int = 0) -> native.NativeDecoder:
    cache, before = BatchCache(model.config), torch.tensor([0] * (rows - 1) + [padding])
    with torch.inference_mode():
        tokens = some_tokens(model.config, rows=rows, length=PROMPT)
        prefill(model, tokens, torch.arange(PROMPT) - before[:, None], cache)
        made = native.NativeDecoder(model, LENGTH)
        made.insert(cache)
        return made


def steps(model: Gemma3, rows: int = 1, padding: int = 0) -> Iterator[Tensor]:
    made = decoder(model, rows, padding)
    before = torch.tensor([0] * (rows - 1) + [padding])
    tokens = some_tokens(model.config, rows=rows, length=LENGTH)
    for at in range(PROMPT, LENGTH):
        yield made.step(tokens[:, at], at - before)


def all_shapes() -> int:
    count = 0
    for (name, precision), rows in itertools.product(itertools.product(SHAPES, PRECISIONS), (1, 2, 3, 4)):
        torch.set_num_threads(1 + count % 3)
        model = PRECISIONS[precision](lively_model(tiny_config(num_hidden_layers=3, **SHAPES[name])))
        for logits in steps(model, rows, padding=rows):
            assert logits.isfinite().all(), (name, precision)
            count += 1
    return count


def hostile_tokens_and_positions() -> int:
    count = 0
    for rows, number in itertools.product((1, 4), (-1, LENGTH, 10**9, 2**31, 2**62, -(2**63), 2**63 - 1)):
        made = decoder(lively_model(tiny_config(num_hidden_layers=3)), rows)
        places = torch.tensor([PROMPT] * (rows - 1) + [number])
        for tokens in (places + 7, torch.full((rows,), 48 + number % 100)):
            made._next = made._next and [PROMPT] * rows
            try:
                made.step(tokens, torch.tensor([PROMPT] * rows))
            except IndexError:
                count += 1
        made._next, made._capacity, made._allocated = places.tolist(), 2**63, LENGTH  # past the checks of Python
        made._allocate = lambda *_: None  # type: ignore[method-assign]
        try:
            made.step(torch.full((rows,), 5), places)
        except IndexError:
            count += 1
    return count


def hostile_weights() -> int:
    count = 0
    for precision, value, everywhere in itertools.product(PRECISIONS, VALUES, (False, True)):
        model = lively_model(tiny_config(num_hidden_layers=3, intermediate_size=1037))
        model = PRECISIONS[precision](model)
        with torch.no_grad():
            for module in model.modules():
                weight = getattr(module, "weight", None)
                held = weight.scales if isinstance(weight, Int8) else weight
                if held is not None:
                    held.view(-1)[:: 1 if everywhere else 7] = value
        count += sum(1 for _ in steps(model, rows=2, padding=3))
    return count


def hostile_constants() -> int:
    """Of numbers that a config refuses, too: C must not depend on that."""
    models = [lively_model(tiny_config(num_hidden_layers=3)) for _ in CONSTANTS]
    for model, constants in zip(models, CONSTANTS, strict=True):
        model.config = model.config.model_copy(update=constants)
    return sum(1 for model in models for _ in steps(model, rows=2))


def misaligned_weights() -> int:
    count = 0
    for dtype in (torch.float32, torch.bfloat16):
        model = lively_model(tiny_config(num_hidden_layers=3)).to(dtype)
        for weight in model.parameters():
            room = torch.zeros(weight.nbytes + 1, dtype=torch.uint8).numpy()
            weight.data = torch.frombuffer(room, dtype=dtype, offset=1).view(weight.shape).copy_(weight.data)
        count += sum(1 for _ in steps(model))
    return count


if __name__ == "__main__":
    library.FLAGS = (*library.FLAGS, *SANITIZE)
    library.SOURCE = Path(sys.argv[1]) if len(sys.argv) > 1 else library.SOURCE
    native.FIRST_POSITIONS = 1  # memory for positions grows in nearly every text
    found = library.load_library()
    assert not isinstance(found, str), found
    for scenario in (all_shapes, hostile_tokens_and_positions, hostile_weights, hostile_constants, misaligned_weights):
        sys.stdout.write(f"{scenario.__name__} {scenario()}\n")
