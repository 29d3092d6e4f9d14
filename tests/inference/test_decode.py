"""Every way of decoding gives the logits of the model; what is told where a way is closed."""

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

import pytest
import torch
from gemmule.inference.decode import CompiledDecoder, Decoder, Decoding, StaticCache, make_decoder, prefill, static_step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemmule.errors import DeviceError, ModelError
from gemmule.inference import decode as decode_module
from gemmule.inference.engine import stream_tokens
from gemmule.inference.huge_pages import move_to_huge_pages
from gemmule.inference.kv_cache import BatchCache
from gemmule.inference.native import binding
from gemmule.inference.native import decoder as native
from gemmule.inference.native.library import SOURCE, load_library
from gemmule.inference.quantize import quantize
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.finite import nonfinite_weights
from gemmule.model.gemma3 import Gemma3, last_logits
from runs import number_printed_by
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

GREEDY = SamplingSettings(temperature=0)
LONG = 40  # of a text: eight windows
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "a window of one": {"sliding_window": 1},
    "a window of two": {"sliding_window": 2},
    "a window beyond the text": {"sliding_window": 64},
    "untied": {"tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1},
    "as many key as query heads": {"num_key_value_heads": 4},
    "all local": {"sliding_window_pattern": 9},
    "all global": {"sliding_window_pattern": 1},
    "factor three": {"rope_scaling_factor": 3.0},
    "odd sizes": {"hidden_size": 20, "intermediate_size": 37, "head_dim": 6, "vocab_size": 51},
    "many rows of a matrix": {"vocab_size": 6001, "intermediate_size": 3001},
}
PROMPTS = [[2, 40, 41, 42, 43], [2], [7, 8]] * 4
PADDING = torch.tensor([0, 3, 8])

needs_compiler = pytest.mark.skipif(isinstance(load_library(), str), reason="no C compiler here")


class Static:
    """What is compiled, as it was written."""

    def __init__(self, model: Gemma3, cache: BatchCache, rows: int, capacity: int) -> None:
        self._model, self._cache = model, StaticCache(model, rows, capacity)
        self._cache.fill(range(rows), cache)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return static_step(self._model, tokens[:, None], positions[:, None], self._cache)


def decode(
    model: Gemma3, way: str, tokens: Tensor, prompt: int, padding: Tensor, first: Gemma3 | None = None
) -> Tensor:
    """Feed tokens (B,T), the prompt at once by `first` and then one by one; return the logits (B,T-prompt+1,V)."""
    rows, length = tokens.shape
    cache = BatchCache(model.config)
    with torch.inference_mode():
        logits = [prefill(first or model, tokens[:, :prompt], torch.arange(prompt) - padding[:, None], cache)]
        decoder: Decoder
        if way == "static":
            decoder = Static(model, cache, rows, length)
        else:
            decoder = make_decoder(model, rows, length, way)  # type: ignore[arg-type]
            decoder.insert(cache)
        logits += [decoder.step(tokens[:, at], at - padding[:rows]) for at in range(prompt, length)]
    return torch.stack(logits, dim=1)


WAYS = [pytest.param("native", marks=needs_compiler), "static"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompt", [9, 1, 39])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_gives_the_plain_logits(shape: str, prompt: int, way: str) -> None:
    model = lively_model(tiny_config(**SHAPES[shape]))
    tokens, padding = some_tokens(model.config, rows=3, length=LONG), PADDING * (prompt > 8)
    plain = decode(model, "plain", tokens, prompt, padding)
    assert plain.std() > 0.3
    assert greatest_difference(decode(model, way, tokens, prompt, padding), plain) < 1e-4


MODELS = {window: lively_model(tiny_config(sliding_window=window)) for window in (1, 3, 5, 40)}


@pytest.mark.slow
@needs_compiler
@settings(max_examples=30)
@given(
    window=st.sampled_from(sorted(MODELS)),
    padding=st.lists(st.integers(0, 12), min_size=1, max_size=native.MAX_ROWS),
    seed=st.integers(0, 99),
)
def test_rows_with_any_padding_are_each_row_alone(window: int, padding: list[int], seed: int) -> None:
    model = MODELS[window]
    tokens = some_tokens(model.config, rows=len(padding), length=24, seed=seed)
    together = decode(model, "native", tokens, 13, torch.tensor(padding))
    for row, left in enumerate(padding):
        alone = decode(model, "plain", tokens[row : row + 1, left:], 13 - left, torch.tensor([0]))
        assert greatest_difference(together[row : row + 1], alone) < 1e-4


@needs_compiler
def test_bf16_weights_are_computed_with_in_fp32() -> None:
    """From the same cache, the step on bf16 weights is an fp32 model of these weights."""
    config = tiny_config(hidden_size=16, intermediate_size=37)  # the root of 16 is not rounded
    model = lively_model(config).bfloat16()
    wide = copy.deepcopy(model).float()
    tokens, nothing = some_tokens(model.config, length=LONG), torch.tensor([0, 0])
    exact = decode(wide, "plain", tokens, 9, nothing)
    assert greatest_difference(decode(model, "native", tokens, 9, nothing, first=wide), exact) < 1e-4
    ours, plain = (decode(model, way, tokens, 9, nothing) for way in ("native", "plain"))
    assert (ours - exact).square().mean() < (plain - exact).square().mean()


@needs_compiler
@pytest.mark.parametrize("tied", [True, False])
def test_int8_weights_mean_the_same_to_the_model_and_to_c(tied: bool) -> None:
    """C multiplies them with sixteen bits of each activation."""
    model = quantize(lively_model(tiny_config(tie_word_embeddings=tied, intermediate_size=1100)))
    tokens = some_tokens(model.config, rows=3, length=LONG)
    plain = decode(model, "plain", tokens, 9, PADDING)
    assert greatest_difference(decode(model, "native", tokens, 9, PADDING), plain) < 2e-3


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    """Whoever takes which rows, each sum is taken in one order."""
    model, usual = lively_model(tiny_config(**SHAPES["many rows of a matrix"])), torch.get_num_threads()
    tokens, nothing = some_tokens(model.config, rows=2, length=20), torch.tensor([0, 0])
    torch.set_num_threads(1)
    alone = decode(model, "native", tokens, 3, nothing)[:, 1:]
    try:
        torch.set_num_threads(threads)
        assert greatest_difference(decode(model, "native", tokens, 3, nothing)[:, 1:], alone) < 1e-5
    finally:
        torch.set_num_threads(usual)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are not bound to cores here")
def test_threads_are_free_to_move_after_a_step() -> None:
    before = os.sched_getaffinity(0)
    tokens_of(lively_model(tiny_config()), "native")
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
from tiny import lively_model, tiny_config

def masks():
    return {{task: sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}}

def tell():
    list(stream_tokens(model, [[2, 40]], 20, frozenset(), SamplingSettings(temperature=0), decoding="native"))

model = lively_model(tiny_config(num_hidden_layers=3))
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
        ({"OMP_PROC_BIND": "true"}, ""),
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
    model = lively_model(tiny_config())
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
    model = lively_model(tiny_config(hidden_size=96))
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


def damaged(dtype: torch.dtype, name: str, value: float) -> Gemma3:
    """Return a model with one number of one weight replaced."""
    model = lively_model(tiny_config(num_hidden_layers=3)).to(dtype)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    return model


NAMES = [name for name, _ in Gemma3(tiny_config(num_hidden_layers=3)).named_parameters()]


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
    model = lively_model(tiny_config(num_hidden_layers=3))
    model = quantize(model) if eight else model
    with torch.no_grad():
        model.blocks[1].post_mlp_norm.weight[0] = value
    for way in ("plain", "native"):
        with pytest.raises(ModelError, match="the model's logits are not finite"):
            tokens_of(model, way, prompts=1)  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize("token", [-1, 48, 2**31, 2**62, -(2**63)])
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_beyond_the_vocabulary_are_refused_by_c(rows: int, token: int) -> None:
    decoder, step = native_decoder(rows)
    tokens = torch.tensor([40] * (rows - 1) + [token])
    with pytest.raises(IndexError, match=f"tokens .*{token}.*: the vocabulary has 48"):
        decoder.step(tokens, step)


@needs_compiler
@pytest.mark.parametrize("position", [-1, 0, 12, 14, 20, 2**62, -(2**63)])
def test_only_the_next_position_is_decoded(position: int) -> None:
    decoder, step = native_decoder(2)
    assert step.tolist() == [13, 13]
    with pytest.raises(ValueError, match=r"the next positions are \[13, 13\]"):
        decoder.step(torch.tensor([5, 6]), torch.tensor([13, position]))
    with pytest.raises(ValueError, match=r"the next positions are \[13, 13\]"):
        decoder.step(torch.tensor([5, 6, 7]), torch.tensor([13, 13, 13]))
    for at in range(13, 20):
        decoder.step(torch.tensor([5, 6]), torch.tensor([at, at]))
    with pytest.raises(ValueError, match="position 20: the decoder was made for 20 positions"):
        decoder.step(torch.tensor([5, 6]), torch.tensor([20, 20]))


@needs_compiler
def test_tokens_and_positions_of_any_integer_type_and_layout_will_do() -> None:
    expected = native_decoder(2)[0].step(torch.tensor([5, 6]), torch.tensor([13, 13]))
    spread, narrow = torch.tensor([[5, 0], [6, 0]])[:, 0], torch.tensor([13, 13], dtype=torch.int16)
    assert torch.equal(native_decoder(2)[0].step(spread, narrow), expected)
    with pytest.raises(TypeError):
        native_decoder(2)[0].step(torch.tensor([5.0, 6.0]), narrow)


def native_decoder(rows: int, capacity: int = 20, **shape: Any) -> tuple[native.NativeDecoder, Tensor]:
    """Return a decoder that has read 13 tokens, and the positions that come next."""
    model = lively_model(tiny_config(**shape))
    decoder = native.NativeDecoder(model, capacity)
    decoder.insert(read_cache(model, rows))
    return decoder, torch.full((rows,), 13)


def read_cache(model: Gemma3, rows: int = 2) -> BatchCache:
    """Return what a model remembers of 13 tokens."""
    cache = BatchCache(model.config)
    with torch.inference_mode():
        prefill(model, some_tokens(model.config, rows=rows), torch.arange(13)[None], cache)
    return cache


@needs_compiler
@pytest.mark.parametrize("window", [3, 20, 30, 64])
def test_memory_for_positions_grows_as_the_text_does(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FIRST_POSITIONS", 1)
    model = lively_model(tiny_config(sliding_window=window))
    tokens = some_tokens(model.config, length=64)
    plain = decode(model, "plain", tokens, 9, torch.tensor([0, 3]))
    assert greatest_difference(decode(model, "native", tokens, 9, torch.tensor([0, 3])), plain) < 1e-4


@pytest.mark.parametrize("way", ["plain", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("most", [10**12, 10**18, 2**63, 10**30])
def test_a_limit_of_any_size_takes_no_memory(way: Decoding, most: int) -> None:
    changes = {"max_position_embeddings": most, "sliding_window": most}
    model, usual = lively_model(tiny_config(**changes)), lively_model(tiny_config(sliding_window=64))
    tokens = stream_tokens(model, [[2, 40, 41]], most, frozenset(), GREEDY, decoding=way)
    expected = stream_tokens(usual, [[2, 40, 41]], 9, frozenset(), GREEDY, decoding=way)
    assert [next(tokens) for _ in range(9)] == list(expected)


def test_a_static_cache_that_fits_no_memory_is_refused() -> None:
    model = lively_model(tiny_config())
    with pytest.raises(DeviceError, match=r"decoding 'compiled': no memory for a cache of 1,152,921,504,606,846,976"):
        CompiledDecoder(model, 2, 10**18)


def test_local_rings_are_bounded_by_the_window() -> None:
    model = lively_model(tiny_config(sliding_window=5))
    held = StaticCache(model, 2, 64)
    for kind, (keys, values) in zip(model.config.layer_kinds, held._rings, strict=True):
        assert keys.shape == values.shape
        assert keys.shape[2] == (5 if kind == "local" else 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns itself
def test_a_compiled_step_gives_the_plain_tokens() -> None:
    model = lively_model(tiny_config())
    assert tokens_of(model, "compiled") == tokens_of(model, "plain")


@needs_compiler
def test_auto_is_native_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = native.NativeDecoder
    monkeypatch.setattr(native, "NativeDecoder", lambda *given: made.append(given[1]) or real(*given))
    model = lively_model(tiny_config())
    assert tokens_of(model, "auto") == tokens_of(model, "plain")
    assert made == [24]
    assert tokens_of(model, "auto", prompts=native.MAX_ROWS + 1) == tokens_of(
        model, "plain", prompts=native.MAX_ROWS + 1
    )
    assert made == [24], "more rows than it is good for"


@needs_compiler
def test_what_c_cannot_step_is_told() -> None:
    model = lively_model(tiny_config())
    assert native.unavailable_reason(model) is None
    assert native.unavailable_reason(model, native.MAX_ROWS + 1) == "5 rows, more than 4"
    assert "float64 on cpu, not fp32, bf16 or int8" in str(native.unavailable_reason(copy.deepcopy(model).double()))
    assert "on meta" in str(native.unavailable_reason(copy.deepcopy(model).to("meta")))
    model.forward = None  # type: ignore[method-assign, assignment]
    assert native.unavailable_reason(model) == "the model's forward is not Gemma 3's own"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_aligned_are_copied_to_where_c_can_read_them(dtype: torch.dtype) -> None:
    """As they come out of a safetensors file whose header was not padded."""
    model = lively_model(tiny_config()).to(dtype)
    expected = tokens_of(model, "native")
    for weight in model.parameters():
        room = torch.zeros(weight.nbytes + 1, dtype=torch.uint8).numpy()
        weight.data = torch.frombuffer(room, dtype=dtype, offset=1).view(weight.shape).copy_(weight.data)
        assert weight.data_ptr() % weight.element_size() == 1
    assert tokens_of(model, "native") == expected
    decoder = native.NativeDecoder(model, 20)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in decoder._packed.tensors)


@pytest.mark.parametrize("chunk", [1, 4, 5, 16, 36, 64])
@pytest.mark.parametrize("padding", [[0], [0, 3, 8], [0, 2]])
def test_a_prompt_read_in_chunks_gives_the_logits_of_the_whole(
    chunk: int, padding: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model(tiny_config())
    tokens, before = some_tokens(model.config, rows=len(padding), length=17), torch.tensor(padding)[:, None]
    positions = torch.arange(17) - before
    whole = prefill(model, tokens, positions, BatchCache(model.config))
    sizes: list[int] = []
    forward = model.forward

    def watched(given: Tensor, *rest: Any, output_head: Any) -> Tensor:
        sizes.append(given.numel())
        assert (output_head is last_logits) == (sum(sizes) == tokens.numel()), "only the last chunk is predicted from"
        return forward(given, *rest, output_head=output_head)

    monkeypatch.setattr(decode_module, "PREFILL_CHUNK_CPU", chunk)
    monkeypatch.setattr(model, "forward", watched)
    cache = BatchCache(model.config)
    assert greatest_difference(prefill(model, tokens, positions, cache), whole) < 1e-5
    assert max(sizes) <= max(chunk, len(padding))
    assert (sum(sizes), cache.length) == (tokens.numel(), 17)


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
    model = lively_model(tiny_config(vocab_size=3000, num_hidden_layers=3))
    model = quantize(model) if eight else model
    prompts, sampling = [[2, 40, 41], [7]], SamplingSettings(top_k=9, top_p=0.9, min_p=0.01)
    expected = list(stream_tokens(model, prompts, 12, frozenset(), sampling, seed=0, decoding=way))
    stream = stream_tokens(model, prompts, 12, frozenset(), sampling, seed=0, decoding=way)
    tokens = [next(stream) for _ in range(begun)]
    with torch_defaults(dtype, device):
        tokens += list(stream)
    assert tokens == expected


def test_the_structures_of_c_and_python_have_the_same_sizes(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = tmp_path / "sizes.c"
    program.write_text(
        f'#include "{SOURCE}"\n#include <stdio.h>\n'
        'int main(void) { printf("%zu %zu %zu", sizeof(Matrix), sizeof(Layer), sizeof(Model)); }\n'
    )
    subprocess.run([compiler, str(program), "-o", str(tmp_path / "sizes"), "-lm"], check=True)
    sizes = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout.split()
    ours = [ctypes.sizeof(kind) for kind in (binding.MatrixStruct, binding.LayerStruct, binding.ModelStruct)]
    assert ours == [int(size) for size in sizes]
