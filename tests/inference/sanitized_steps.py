"""Runs step.c, compiled with AddressSanitizer and UndefinedBehaviorSanitizer, over whatever could lead it astray.

    LD_PRELOAD=LIBASAN:LIBSTDC++ ASAN_OPTIONS=detect_leaks=0 XDG_CACHE_HOME=EMPTY python sanitized_steps.py [step.c]

The process dies with a report at the first access out of bounds and at the first undefined operation; it prints how
many steps were made. `test_sanitized.py` starts it.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from gemmule.inference import kv_cache
from gemmule.inference.native import library
from gemmule.inference.pages import KINDS, PAGE
from gemmule.inference.quantize import Int8, quantize
from gemmule.inference.step_batch import StepBatch
from gemmule.model.gemma3 import Gemma3
from readings import Reading, one_by_one, some_plan, some_texts
from tiny import lively_model, tiny_config

SANITIZE = ("-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
LENGTHS = (40, 1, 23, 2, 17)

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "window 1": {"sliding_window": 1},
    "window of a page": {"sliding_window": PAGE},
    "window of a page and one": {"sliding_window": PAGE + 1},
    "window beyond the text": {"sliding_window": 64},
    "untied": {"tie_word_embeddings": False},
    "all local": {"sliding_window_pattern": 9},
    "all global": {"sliding_window_pattern": 1},
    "three heads, one key head": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "head_dim 2": {"head_dim": 2, "num_attention_heads": 6, "num_key_value_heads": 3},
    "head_dim 74": {"head_dim": 74},
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
    {"sliding_window": 2**61},
    {"sliding_window": 2**62},
    {"sliding_window": 10**30},
]
NUMBERS = (-1, 80, 10**9, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1)
PAGES = (0, -1, 5, 1000, 2**31 - 1, -(2**31))
VALUES = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, -1e-45, 0.0]
PRECISIONS: dict[str, Callable[[Gemma3], Gemma3]] = {"fp32": Gemma3.float, "bf16": Gemma3.bfloat16, "int8": quantize}


def steps(model: Gemma3, seed: int, lengths: Sequence[int] = LENGTHS) -> tuple[int, bool]:
    """Read texts in steps of single tokens and of pieces; return how many, and whether all logits are finite."""
    reading, plan = Reading(model, "native", some_texts(model, lengths)), some_plan(lengths, seed, most=12)
    for counts in plan:
        reading.step(counts)
    for row in range(len(lengths)):
        reading.cache.finish(row)
    return len(plan), all(bool(logits.isfinite().all()) for row in reading.logits for logits in row)


def all_shapes() -> int:
    count = 0
    for (name, precision), seed in itertools.product(itertools.product(SHAPES, PRECISIONS), range(3)):
        torch.set_num_threads(1 + count % 3)
        made, finite = steps(
            PRECISIONS[precision](lively_model(tiny_config(num_hidden_layers=3, **SHAPES[name]))), seed
        )
        assert finite, (name, precision)
        count += made
    return count


def all_numbers_of_rows() -> int:
    """Of every way to cut tokens into tiles, one text alone among them."""
    count = 0
    for precision, rows in itertools.product(PRECISIONS, range(1, 14)):
        model = PRECISIONS[precision](lively_model(tiny_config(num_hidden_layers=3)))
        reading = Reading(model, "native", some_texts(model, [3] * rows))
        for counts in (dict.fromkeys(range(rows), 1), dict.fromkeys(range(rows), 2)):
            reading.step(counts)
            count += 1
        alone = Reading(model, "native", reading.texts)
        for counts in one_by_one([3] * rows):
            alone.step(counts)
        for pair in zip(reading.logits, alone.logits, strict=True):
            assert torch.equal(*map(torch.stack, pair))
    return count


def refused(reading: Reading, batch: StepBatch) -> int:
    """Return whether C refuses a step, as a number."""
    try:
        reading.runner.run(batch)
    except IndexError:
        return 1
    return 0


def hostile_batches() -> int:
    """Tokens, positions, rows, outputs and pages that are none; return how many steps were refused."""
    count = 0
    for counts in ({0: 1}, {2: 3, 0: 9, 1: 1, 4: 1}):
        reading = Reading(lively_model(tiny_config(num_hidden_layers=3)), "native", some_texts(MODEL, LENGTHS))
        reading.step({0: 17, 2: 5})
        batch = reading.batch(counts)
        for name, number in itertools.product(StepBatch._fields, NUMBERS):
            right = getattr(batch, name)
            for at in range(len(right)):
                wrong = np.where(np.arange(len(right)) == at, number, right)
                assert refused(reading, batch._replace(**{name: wrong})), (name, number)
                count += 1
            count += refused(reading, batch._replace(**{name: np.full(len(right) + 1, number)}))
        for kind in KINDS:
            table = reading.cache.tables[kind]
            for row, page, number in itertools.product((0, 2), range(table.shape[1]), PAGES):
                right, table[row, page] = int(table[row, page]), number
                count += refused(reading, batch)
                table[row, page] = right
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
        count += sum(steps(model, seed)[0] for seed in range(2))
    return count


def hostile_constants() -> int:
    """Of numbers that a config refuses, too: C must not depend on that."""
    models = [lively_model(tiny_config(num_hidden_layers=3)) for _ in CONSTANTS]
    for model, constants in zip(models, CONSTANTS, strict=True):
        model.config = model.config.model_copy(update=constants)
    return sum(steps(model, seed)[0] for model in models for seed in range(2))


def misaligned_weights() -> int:
    count = 0
    for dtype in (torch.float32, torch.bfloat16):
        model = lively_model(tiny_config(num_hidden_layers=3)).to(dtype)
        for weight in model.parameters():
            room = torch.zeros(weight.nbytes + 1, dtype=torch.uint8).numpy()
            weight.data = torch.frombuffer(room, dtype=dtype, offset=1).view(weight.shape).copy_(weight.data)
        count += steps(model, seed=0)[0]
    return count


MODEL = lively_model(tiny_config(num_hidden_layers=3))
SCENARIOS = (all_shapes, all_numbers_of_rows, hostile_batches, hostile_weights, hostile_constants, misaligned_weights)

if __name__ == "__main__":
    library.FLAGS = (*library.FLAGS, *SANITIZE)
    library.SOURCE = Path(sys.argv[1]) if len(sys.argv) > 1 else library.SOURCE
    kv_cache._FIRST_PAGES = 1  # page tables and pools grow in nearly every text
    found = library.load_library()
    assert not isinstance(found, str), found
    for scenario in SCENARIOS:
        sys.stdout.write(f"{scenario.__name__} {scenario()}\n")
        sys.stdout.flush()
