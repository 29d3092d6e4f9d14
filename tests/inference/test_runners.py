"""Every runner gives the logits of the model's own full forward; what is told where one is not available."""

import copy
import ctypes
import gc
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemmule.errors import DeviceError, ModelError
from gemmule.inference import engine as engine_module
from gemmule.inference import kv_cache as kv_cache_module
from gemmule.inference import runners as runners_module
from gemmule.inference.engine import Engine, stream_tokens
from gemmule.inference.huge_pages import move_to_huge_pages
from gemmule.inference.native import binding
from gemmule.inference.native import runner as native
from gemmule.inference.native.library import SOURCE, load_library
from gemmule.inference.pages import KINDS, PAGE
from gemmule.inference.quantize import quantize
from gemmule.inference.requests import Request
from gemmule.inference.runners import CompiledRunner, Decoding, static_step
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.config import Kind
from gemmule.model.finite import nonfinite_weights
from gemmule.model.gemma3 import Gemma3
from readings import Reading, equal, full_forward, greatest, one_by_one, read, some_plan, some_texts
from runs import number_printed_by
from tiny import greatest_difference, lively_model, shallow_config

GREEDY = SamplingSettings(temperature=0)
LENGTHS = (70, 1, 37, 52)  # of texts: more than four pages, and fourteen windows
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "a window of one": {"sliding_window": 1},
    "a window of two": {"sliding_window": 2},
    "a window of a page": {"sliding_window": PAGE},
    "a window of a page and one": {"sliding_window": PAGE + 1},
    "a window of two pages and two": {"sliding_window": 2 * PAGE + 2},
    "a window beyond the text": {"sliding_window": 100},
    "untied": {"tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1},
    "as many key as query heads": {"num_key_value_heads": 4},
    "all local": {"sliding_window_pattern": 9},
    "all global": {"sliding_window_pattern": 1},
    "factor three": {"rope_scaling_factor": 3.0},
    "odd sizes": {"hidden_size": 20, "intermediate_size": 37, "head_dim": 6, "vocab_size": 51},
    "wide heads": {"head_dim": 74},
    "many rows of a matrix": {"vocab_size": 6001, "intermediate_size": 3001},
}
PRECISIONS: dict[str, Callable[[Gemma3], Gemma3]] = {"fp32": Gemma3.float, "bf16": Gemma3.bfloat16, "int8": quantize}
PROMPTS = [[2, 40, 41, 42, 43], [2], [7, 8]] * 4

needs_compiler = pytest.mark.skipif(isinstance(load_library(), str), reason="no C compiler here")
WAYS = ["plain", pytest.param("native", marks=needs_compiler), "compiled"]

COMPILED_STEP = runners_module._compiled_step


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Let the compiled runner run its step as it was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners_module, "_compiled_step", lambda tuned: static_step)
        patch.setattr(runners_module, "reason_not_to_compile", lambda device: None)
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_runner_gives_the_logits_of_the_full_forward(shape: str, way: Decoding) -> None:
    """Of several texts, in steps of single tokens and of pieces of prompts, in any order of the rows."""
    model = lively_model(shallow_config(**SHAPES[shape]))
    texts = some_texts(model, LENGTHS)
    expected = full_forward(model, texts)
    assert torch.cat(expected).std() > 0.3
    assert greatest(read(model, way, texts, some_plan(LENGTHS, 0)), expected) < 1e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [1, 4, 15, 16, 17, 36, 64, 70])
def test_a_prompt_cut_in_chunks_of_any_size_gives_the_logits_of_the_whole(chunk: int, way: Decoding) -> None:
    model = lively_model(shallow_config())
    texts = some_texts(model, LENGTHS[:1])
    plan = [{0: min(chunk, LENGTHS[0] - first)} for first in range(0, LENGTHS[0], chunk)]
    assert greatest(read(model, way, texts, plan), full_forward(model, texts)) < 1e-4


MODELS = {window: lively_model(shallow_config(sliding_window=window)) for window in (1, 3, 5, 16, 17, 40)}


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(["plain", "compiled", *([] if isinstance(load_library(), str) else ["native"])]),
    window=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    most=st.integers(1, 60),
)
def test_rows_of_any_lengths_are_each_text_alone(
    way: Decoding, window: int, lengths: list[int], seed: int, most: int
) -> None:
    model = MODELS[window]
    texts = some_texts(model, lengths)
    ours = read(model, way, texts, some_plan(lengths, seed, most))
    assert greatest(ours, full_forward(model, texts)) < 1e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [1, 3, 5, 40])
def test_texts_that_come_and_go_are_each_text_alone(window: int, way: Decoding) -> None:
    """In rows and pages that others had before."""
    model = MODELS[window]
    texts = some_texts(model, [30, 45, 1, 60, 20, 33, 17, 2, 50])
    expected, reading = full_forward(model, texts), Reading(model, way, texts[:3], longest=60)
    present, coming = {0: 0, 1: 1, 2: 2}, 3  # the text of each row
    while present:
        reading.step({row: min(reading.left(row), 9 if reading.left(row) > 20 else 1) for row in present})
        for row, number in [*present.items()]:
            if reading.left(row):
                continue
            del present[row]
            if coming < len(texts):
                present[row], coming = coming, coming + 1
            logits = reading.replace(row, texts[present.get(row, 0)])
            assert greatest_difference(logits, expected[number]) < 1e-4


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_native_logits_of_a_token_are_the_same_bits_in_every_step(shape: str, precision: str) -> None:
    """Alone, in a chunk of any size, among other rows: no sum depends on what else is computed."""
    model = PRECISIONS[precision](lively_model(shallow_config(**SHAPES[shape])))
    texts = some_texts(model, LENGTHS)
    alone = read(model, "native", texts, one_by_one(LENGTHS))
    assert all(logits.isfinite().all() for logits in alone)
    assert equal(read(model, "native", texts, [dict(enumerate(LENGTHS))]), alone), "all of all texts at once"
    assert equal(read(model, "native", texts, some_plan(LENGTHS, 0)), alone)


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", range(2, 14))
def test_the_native_logits_are_the_same_bits_for_any_number_of_rows(rows: int, precision: str) -> None:
    """Of every way to cut rows into tiles of a matmul."""
    model = PRECISIONS[precision](lively_model(shallow_config(hidden_size=50, intermediate_size=530)))
    lengths = [3] * rows
    texts = some_texts(model, lengths)
    together = read(model, "native", texts, [dict.fromkeys(range(rows), 1) for _ in range(3)])
    assert equal(together, read(model, "native", texts, one_by_one(lengths)))


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int, precision: str) -> None:
    """Whoever takes which rows of a matrix, each sum is taken in one order."""
    config = shallow_config(num_hidden_layers=3, **SHAPES["many rows of a matrix"])
    model, usual = lively_model(config), torch.get_num_threads()
    model = PRECISIONS[precision](model)
    texts, plan = some_texts(model, LENGTHS), some_plan(LENGTHS, 1)
    try:
        torch.set_num_threads(1)
        alone = read(model, "native", texts, plan)
        torch.set_num_threads(threads)
        assert equal(read(model, "native", texts, plan), alone)
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("way", WAYS)
def test_the_logits_of_some_tokens_are_those_among_all(way: Decoding) -> None:
    model = lively_model(shallow_config())
    counts, outputs = {2: 3, 0: 1, 1: 1, 3: 20}, np.array([0, 4, 5, 24])
    readings = [Reading(model, way, some_texts(model, LENGTHS)) for _ in range(2)]
    batches = [reading.batch(counts) for reading in readings]
    with torch.inference_mode():
        every = readings[0].runner.run(batches[0])
        some = readings[1].runner.run(batches[1]._replace(outputs=outputs))
    assert greatest_difference(some, every[outputs]) <= (0 if way == "native" else 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_may_want_no_logits(way: Decoding) -> None:
    model = lively_model(shallow_config())
    reading = Reading(model, way, some_texts(model, LENGTHS))
    with torch.inference_mode():
        logits = reading.runner.run(reading.batch({0: 9, 2: 1})._replace(outputs=np.empty(0, dtype=np.int64)))
    assert logits.shape == (0, model.config.vocab_size)
    reading.step({0: 1, 2: 1})
    assert greatest_difference(reading.logits[0][0], full_forward(model, reading.texts)[0][9]) < 1e-4


@needs_compiler
def test_bf16_weights_are_computed_with_in_fp32() -> None:
    """The step on bf16 weights is an fp32 model of these weights."""
    config = shallow_config(hidden_size=16, intermediate_size=37)  # the root of 16 is not rounded
    model = lively_model(config).bfloat16()
    texts, plan = some_texts(model, LENGTHS), some_plan(LENGTHS, 0)
    exact = full_forward(copy.deepcopy(model).float(), texts)
    ours, plain = (read(model, way, texts, plan) for way in ("native", "plain"))
    assert greatest(ours, exact) < 1e-4
    errors = [(torch.cat(logits) - torch.cat(exact)).square().mean() for logits in (ours, plain)]
    assert errors[0] < errors[1]


@needs_compiler
@pytest.mark.parametrize("tied", [True, False])
def test_int8_weights_mean_the_same_to_the_model_and_to_c(tied: bool) -> None:
    """C multiplies them with sixteen bits of each activation."""
    model = quantize(lively_model(shallow_config(tie_word_embeddings=tied, intermediate_size=1100)))
    texts = some_texts(model, LENGTHS)
    expected = full_forward(model, texts)
    for way in ("native", "plain"):
        assert greatest(read(model, way, texts, some_plan(LENGTHS, 0)), expected) < 2e-3


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are not bound to cores here")
def test_threads_are_free_to_move_after_a_step() -> None:
    before = os.sched_getaffinity(0)
    tokens_of(lively_model(shallow_config()), "native")
    assert os.sched_getaffinity(0) == before
    for task in Path("/proc/self/task").iterdir():
        assert os.sched_getaffinity(int(task.name)) == before


BOUND = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(2)
from gemmule.inference.engine import stream_tokens
from gemmule.inference.sampling import SamplingSettings
from tiny import lively_model, shallow_config

def masks():
    return {{task: sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}}

def tell():
    list(stream_tokens(model, [[2, 40]], 20, frozenset(), SamplingSettings(temperature=0), decoding="native"))

model = lively_model(shallow_config(num_hidden_layers=3))
torch.randn(300, 300) @ torch.randn(300, 300)
tell()  # all threads are there now
{pin}
before = masks()
tell()
after = masks()
assert {{task: after[task] for task in before}} == before, (before, after)
assert all(after.values()) and len(set(sum(after.values(), []))) > 1, after
"""


@needs_compiler
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="there is one core")
@pytest.mark.parametrize(
    ("variables", "pin"),
    [
        pytest.param({"OMP_PROC_BIND": "true"}, "", marks=pytest.mark.slow),  # another way to the same
        ({}, "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"),
    ],
)
def test_threads_that_are_bound_to_cores_stay_there(variables: dict[str, str], pin: str) -> None:
    """All of them were put on the first one's core, for good."""
    code = BOUND.format(tests=str(Path(__file__).parents[1]), pin=pin)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | variables
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


@needs_compiler
def test_a_stream_follows_the_weights_as_they_are() -> None:
    model = lively_model(shallow_config())
    before = tokens_of(model, "native")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.flip(0))
    assert tokens_of(model, "native") == tokens_of(model, "plain") != before


def zero(model: Gemma3) -> None:
    for weight in model.parameters():
        weight.data = torch.zeros_like(weight)


@needs_compiler
@pytest.mark.parametrize("replace", [move_to_huge_pages, quantize, zero, lambda model: model.double().float()])
def test_a_stream_goes_on_with_the_weights_it_began_with_where_they_are_replaced(
    replace: Callable[[Gemma3], object],
) -> None:
    """Their memory was given back while C read it."""
    model = lively_model(shallow_config(hidden_size=96))
    expected = tokens_of(model, "native")
    stream = stream_tokens(model, PROMPTS[:3], 20, frozenset(), GREEDY, decoding="native")
    tokens = [next(stream) for _ in range(4)]
    replace(model)
    gc.collect()
    reused = [torch.full_like(weight, 1e3) for weight in model.parameters() for _ in range(3)]
    assert tokens + list(stream) == expected
    assert reused


def tokens_of(model: Gemma3, way: Decoding, prompts: int = 3) -> list[list[int | None]]:
    return list(stream_tokens(model, PROMPTS[:prompts], 20, frozenset(), GREEDY, decoding=way))


BOTH_KINDS = {"num_hidden_layers": 2, "sliding_window_pattern": 2}


def damaged(dtype: torch.dtype, name: str, value: float) -> Gemma3:
    """Return a model with one number of one weight replaced."""
    model = lively_model(shallow_config(**BOTH_KINDS)).to(dtype)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    return model


NAMES = [name for name, _ in Gemma3(shallow_config(**BOTH_KINDS)).named_parameters()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", ["plain", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_never_make_a_text(dtype: torch.dtype, way: Decoding, value: float) -> None:
    """In every weight, for the prompt and for the steps after it; what comes out is refused, or not touched by it."""
    for name in NAMES:
        model = damaged(dtype, name, value)
        assert nonfinite_weights(model) == [name]
        prompt = [[2, 40, 41, model.config.vocab_size - 1]]  # the last token's row is the one that is damaged
        with pytest.raises(ModelError, match="the model's logits are not finite"):
            list(stream_tokens(model, prompt, 12, frozenset(), GREEDY, decoding=way))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_quantized(value: float) -> None:
    for name in NAMES:
        with pytest.raises(
            ModelError, match=f"the model is damaged: {name} holds NaN or infinity; see `gemmule doctor"
        ):
            quantize(damaged(torch.float32, name, value))


@needs_compiler
@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_becomes_infinite_on_the_way_is_refused_by_every_precision(value: float, eight: bool) -> None:
    """Finite weights, from which a norm without a bound makes what is not; int8 must not round it to something."""
    model = lively_model(shallow_config(num_hidden_layers=3))
    model = quantize(model) if eight else model
    with torch.no_grad():
        model.get_parameter("blocks.1.post_mlp_norm.weight")[0] = value
    for way in ("plain", "native"):
        with pytest.raises(ModelError, match="the model's logits are not finite"):
            tokens_of(model, way, prompts=1)


HOSTILE = [-1, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1]
BEYOND = {"tokens": 48, "positions": 80, "rows": 4, "outputs": 23}  # the first numbers that are none


@needs_compiler
@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("at", [0, 1, -1])
def test_numbers_out_of_range_are_refused_by_c(name: str, at: int) -> None:
    """With IndexError, before anything is written."""
    reading = Reading(lively_model(shallow_config()), "native", some_texts(MODELS[5], LENGTHS))
    counts = {2: 9, 0: 1, 1: 1, 3: 12}
    reading.step({3: 17})
    batch = reading.batch(counts)
    before = [pool.memory.clone() for pool in reading.cache.pools.values()]
    for number in (BEYOND[name], *HOSTILE):
        wrong = getattr(batch, name).copy()
        wrong[at] = number
        with pytest.raises(IndexError, match=r"of the step is out of range: StepBatch\("):
            reading.runner.run(batch._replace(**{name: wrong}))
    assert equal([pool.memory for pool in reading.cache.pools.values()], before)
    assert len(reading.runner.run(batch)) == 23


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_pages_that_are_not_there_are_refused_by_c(kind: Kind) -> None:
    """Nor is page 0, which nobody holds."""
    reading = Reading(lively_model(shallow_config()), "native", some_texts(MODELS[5], LENGTHS))
    reading.step({0: 40, 3: 40})
    batch = reading.batch({3: 1, 0: 9})
    before = [pool.memory.clone() for pool in reading.cache.pools.values()]
    table = reading.cache.tables[kind]
    seen = {"local": (2, 3), "global": (0, 1, 2, 3)}[kind]  # pages of the nine tokens and their windows
    for page in range(table.shape[1]):
        right = int(table[0, page])
        for number in (0, -1, len(reading.cache.pools[kind].memory), -(2**31), 2**31 - 1):
            table[0, page] = number
            if page in seen:
                with pytest.raises(IndexError, match="a page of the step is out of range"):
                    reading.runner.run(batch)
                assert equal([pool.memory for pool in reading.cache.pools.values()], before)
            else:
                reading.runner.run(batch)
                before = [pool.memory.clone() for pool in reading.cache.pools.values()]
        table[0, page] = right


@needs_compiler
def test_outputs_are_wanted_once_and_in_order() -> None:
    reading = Reading(lively_model(shallow_config()), "native", some_texts(MODELS[5], LENGTHS))
    batch = reading.batch({0: 5})
    for outputs in ([1, 1], [3, 2], [0, 1, 2, 3, 4, 4]):
        with pytest.raises(IndexError, match="an output of the step is out of range"):
            reading.runner.run(batch._replace(outputs=np.array(outputs, dtype=np.int64)))


@needs_compiler
@pytest.mark.parametrize("name", ["tokens", "positions", "rows"])
@pytest.mark.parametrize("length", [0, 4, 6])
def test_a_step_whose_arrays_have_different_lengths_is_refused(name: str, length: int) -> None:
    """C would read beyond the shorter one."""
    reading = Reading(lively_model(shallow_config()), "native", some_texts(MODELS[5], LENGTHS))
    batch = reading.batch({0: 5})._replace(**{name: np.zeros(length, dtype=np.int64)})
    with pytest.raises(IndexError, match="different lengths"):
        reading.runner.run(batch)


@pytest.mark.parametrize("way", ["plain", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("window", [3, 20, 30, 64])
def test_memory_for_positions_grows_as_the_texts_do(
    window: int, way: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache_module, "_FIRST_PAGES", 1)
    model = lively_model(shallow_config(sliding_window=window))
    reading = Reading(model, way, some_texts(model, LENGTHS))
    assert (reading.cache.longest, reading.cache.pools["global"].size) == (PAGE, len(LENGTHS))
    for counts in some_plan(LENGTHS, 3, most=9):
        reading.step(counts)
    assert reading.cache.longest >= max(LENGTHS)
    assert greatest([torch.stack(each) for each in reading.logits], full_forward(model, reading.texts)) < 1e-4


@pytest.mark.parametrize("way", ["plain", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("most", [10**12, 10**18, 2**63, 10**30])
def test_a_limit_of_any_size_takes_no_memory(way: Decoding, most: int) -> None:
    changes = {"max_position_embeddings": most, "sliding_window": most}
    model, usual = lively_model(shallow_config(**changes)), lively_model(shallow_config(sliding_window=64))
    tokens = stream_tokens(model, [[2, 40, 41]], most, frozenset(), GREEDY, decoding=way)
    expected = stream_tokens(usual, [[2, 40, 41]], 9, frozenset(), GREEDY, decoding=way)
    assert [next(tokens) for _ in range(9)] == list(expected)


def test_a_static_cache_that_fits_no_memory_is_refused() -> None:
    model = lively_model(shallow_config())
    with pytest.raises(
        DeviceError, match=r"decoding 'compiled': no memory for a KV cache of 2 x 1,000,000,000,000,000,000 positions"
    ):
        Engine(model, 2, 10**18, "compiled")


def test_local_pages_of_the_compiled_runner_are_bounded_by_the_window() -> None:
    model = lively_model(shallow_config(sliding_window=5, num_hidden_layers=3))
    engine = Engine(model, 2, 10_000, "compiled", chunk=16)
    assert engine.cache.pools["global"].size == 2 * 10_000 // PAGE
    assert engine.cache.pools["local"].size == 2 * 4  # a chunk, the page before it, and the window before that
    reading = Reading(model, "compiled", [[5] * 200])
    for _ in range(200):
        reading.step({0: 1})
    assert isinstance(reading.runner, CompiledRunner)
    for graph in reading.runner._graphs.values():
        assert graph._pages["local"].shape == (1, min(graph._pages["global"].shape[1], 2))


def test_rows_that_the_compiled_step_does_not_read_are_not_written_to() -> None:
    """It computes all rows; a row whose prompt waits lost its first position to that."""
    model = lively_model(shallow_config())
    reading = Reading(model, "compiled", some_texts(model, LENGTHS))
    for counts in [{0: 1, 1: 1, 2: 1, 3: 1}, *[{0: 1}] * 20, *[{2: 1, 3: 1}] * 20]:
        reading.step(counts)
    expected = full_forward(model, reading.texts)
    for row, logits in enumerate(reading.logits):
        assert greatest_difference(torch.stack(logits), expected[row][: len(logits)]) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns itself
def test_a_compiled_step_gives_the_plain_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners_module, "_compiled_step", COMPILED_STEP)
    model = lively_model(shallow_config())
    assert tokens_of(model, "compiled") == tokens_of(model, "plain")


@needs_compiler
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_auto_is_native_where_it_can_be_for_any_number_of_rows(rows: int) -> None:
    model = lively_model(shallow_config())
    engine = Engine(model, rows, 20)
    assert engine.decoding == "native"
    assert isinstance(engine._runner, native.NativeRunner)
    prompts = [[2, 40, 41, 42, 43], [2], [7, 8]] * 14
    ours, plain = (
        [*stream_tokens(model, prompts[:rows], 20, frozenset(), GREEDY, decoding=way)] for way in ("auto", "plain")
    )
    assert ours == plain


@needs_compiler
def test_what_c_cannot_step_is_told() -> None:
    model = lively_model(shallow_config())
    assert native.unavailable_reason(model) is None
    assert "float64 on cpu, not fp32, bf16 or int8" in str(native.unavailable_reason(copy.deepcopy(model).double()))
    assert "on meta" in str(native.unavailable_reason(copy.deepcopy(model).to("meta")))
    mixed = copy.deepcopy(model)
    mixed.get_submodule("blocks.2.mlp").bfloat16()
    assert str(native.unavailable_reason(mixed)).endswith(", not of one dtype")
    model.forward = None  # type: ignore[method-assign, assignment]
    assert native.unavailable_reason(model) == "the model's forward is not Gemma 3's own"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_aligned_are_copied_to_where_c_can_read_them(dtype: torch.dtype) -> None:
    """As they come out of a safetensors file whose header was not padded."""
    model = lively_model(shallow_config()).to(dtype)
    expected = tokens_of(model, "native")
    for weight in model.parameters():
        room = torch.zeros(weight.nbytes + 1, dtype=torch.uint8).numpy()
        weight.data = torch.frombuffer(room, dtype=dtype, offset=1).view(weight.shape).copy_(weight.data)
        assert weight.data_ptr() % weight.element_size() == 1
    assert tokens_of(model, "native") == expected
    runner = Reading(model, "native", PROMPTS[:3]).runner
    assert isinstance(runner, native.NativeRunner)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in runner._packed.tensors)


@pytest.mark.parametrize("chunk", [1, 4, 5, 16, 36, 64])
@pytest.mark.parametrize("lengths", [(17,), (17, 14, 9), (17, 15)])
def test_an_engine_reads_prompts_in_chunks_and_predicts_from_their_ends_alone(
    chunk: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model(shallow_config())
    prompts = some_texts(model, lengths)
    expected = [int(logits[-1].argmax()) for logits in full_forward(model, prompts)]
    read_tokens: list[int] = []
    predicted: list[int] = []
    forward = model.forward

    def watched(given: Tensor, *rest: Any, **options: Any) -> Tensor:
        logits = forward(given, *rest, **options)
        read_tokens.append(given.numel())
        predicted.append(len(logits))
        return logits

    monkeypatch.setattr(engine_module, "CHUNK_CPU", chunk)
    monkeypatch.setattr(model, "forward", watched)
    engine = Engine(model, len(prompts), max(lengths), "plain")
    replies = [engine.submit(Request(tuple(prompt), 1, GREEDY))[0] for prompt in prompts]
    while not engine.idle:
        before = sum(read_tokens)
        engine.step()
        assert sum(read_tokens) - before <= chunk
    assert [reply.generated for reply in replies] == [[token] for token in expected]
    assert (sum(read_tokens), sum(predicted)) == (sum(lengths), len(prompts))


LONG_PROMPT = """
import torch
from gemmule.inference.engine import stream_tokens
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.processes import peak_memory, resident_memory

def tell(length):
    prompt = torch.randint(512, (length,)).tolist()
    assert len(list(stream_tokens(model, [prompt], 5, frozenset(), SamplingSettings(), seed=0))) == 5

model = Gemma3(Gemma3Config(
    vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=512,
)).eval()
tell(600)
before = resident_memory()
tell(20_000)
print((peak_memory() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_prompt_of_twenty_thousand_tokens_takes_less_than_150_mib_beside_the_weights() -> None:
    """Read in one piece it took more than 4 GiB."""
    assert number_printed_by(LONG_PROMPT) < 150


@contextmanager
def torch_defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Let torch make tensors of this kind where nothing else is said, as loaders of other libraries do for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.mark.parametrize("way", ["plain", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta")],
)
def test_torchs_defaults_change_nothing(
    dtype: torch.dtype, device: str, begun: int, eight: bool, way: Decoding
) -> None:
    """C wrote fp32 into what was made for two bytes a number."""
    model = lively_model(shallow_config(vocab_size=3000, num_hidden_layers=3))
    model = quantize(model) if eight else model
    prompts, sampling = [[2, 40, 41], [7]], SamplingSettings(top_k=9, top_p=0.9, min_p=0.01)
    expected = list(stream_tokens(model, prompts, 12, frozenset(), sampling, seed=0, decoding=way))
    stream = stream_tokens(model, prompts, 12, frozenset(), sampling, seed=0, decoding=way)
    tokens = [next(stream) for _ in range(begun)]
    with torch_defaults(dtype, device):
        tokens += list(stream)
    assert tokens == expected


STRUCTURES = {
    "Matrix": binding.MatrixStruct,
    "Layer": binding.LayerStruct,
    "Kind": binding.KindStruct,
    "Model": binding.ModelStruct,
    "Pages": binding.PagesStruct,
    "Batch": binding.BatchStruct,
}


def test_the_structures_of_c_and_python_have_the_same_sizes(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = tmp_path / "sizes.c"
    sizes = ", ".join(f"sizeof({name})" for name in STRUCTURES)
    printed = f'printf("{"%zu " * len(STRUCTURES)}", {sizes});'
    program.write_text(f'#include "{SOURCE}"\n#include <stdio.h>\nint main(void) {{ {printed} }}\n')
    subprocess.run([compiler, str(program), "-o", str(tmp_path / "sizes"), "-lm"], check=True)
    told = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout.split()
    ours = [ctypes.sizeof(structure) for structure in STRUCTURES.values()]
    assert ours == [int(size) for size in told]
