"""Every way of decoding gives the logits of the model; what is told where a way is closed."""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemmule.errors import DeviceError
from gemmule.generate import native
from gemmule.generate.decode import Decoder, Decoding, StaticCache, decoder_for, prefill, static_step
from gemmule.generate.engine import stream_tokens
from gemmule.generate.sampling import SamplingSettings
from gemmule.generate.weights import quantise
from gemmule.model.cache import Cache
from gemmule.model.gemma3 import Gemma3
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
PADDING = torch.tensor([0, 3, 8])

needs_compiler = pytest.mark.skipif(isinstance(native._library(), str), reason="no C compiler here")


class Static:
    """What is compiled, as it was written."""

    def __init__(self, model: Gemma3, cache: Cache, rows: int, capacity: int) -> None:
        self._model, self._cache = model, StaticCache(model, cache, rows, capacity)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return static_step(self._model, tokens[:, None], positions[:, None], self._cache)


def decode(
    model: Gemma3, way: str, tokens: Tensor, prompt: int, padding: Tensor, first: Gemma3 | None = None
) -> Tensor:
    """Feed tokens (B,T), the prompt at once by `first` and then one by one; return the logits (B,T-prompt+1,V)."""
    rows, length = tokens.shape
    cache = Cache(model.config)
    with torch.inference_mode():
        logits = [prefill(first or model, tokens[:, :prompt], torch.arange(prompt) - padding[:, None], cache)]
        decoder: Decoder
        if way == "static":
            decoder = Static(model, cache, rows, length)
        else:
            decoder = decoder_for(model, cache, rows, length, way)  # type: ignore[arg-type]
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


@needs_compiler
@settings(max_examples=30)
@given(
    window=st.sampled_from(sorted(MODELS)),
    padding=st.lists(st.integers(0, 12), min_size=1, max_size=native.MOST_ROWS),
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
    model = quantise(lively_model(tiny_config(tie_word_embeddings=tied, intermediate_size=1100)))
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


@needs_compiler
def test_a_stream_follows_the_weights_as_they_are() -> None:
    model = lively_model(tiny_config())
    before = tokens_of(model, "native")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.flip(0))
    assert tokens_of(model, "native") == tokens_of(model, "plain") != before


def tokens_of(model: Gemma3, way: Decoding, prompts: int = 3) -> list[list[int | None]]:
    given = [[2, 40, 41, 42, 43], [2], [7, 8]] * 4
    return list(stream_tokens(model, given[:prompts], 20, frozenset(), GREEDY, decoding=way))


def test_local_rings_are_bounded_by_the_window() -> None:
    model = lively_model(tiny_config(sliding_window=5))
    cache = Cache(model.config)
    with torch.inference_mode():
        prefill(model, some_tokens(model.config), torch.arange(13)[None], cache)
        held = StaticCache(model, cache, 2, 64)
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
    monkeypatch.setattr(native, "NativeDecoder", lambda *given: made.append(given[2]) or real(*given))
    model = lively_model(tiny_config())
    assert tokens_of(model, "auto") == tokens_of(model, "plain")
    assert made == [3]
    assert tokens_of(model, "auto", prompts=native.MOST_ROWS + 1) == tokens_of(
        model, "plain", prompts=native.MOST_ROWS + 1
    )
    assert made == [3], "more rows than it is good for"


@needs_compiler
def test_what_c_cannot_step_is_told() -> None:
    model = lively_model(tiny_config())
    assert native.reason_against(model) is None
    assert native.reason_against(model, native.MOST_ROWS + 1) == "5 rows, more than 4"
    assert "float64 on cpu, not fp32, bf16 or int8" in str(native.reason_against(copy.deepcopy(model).double()))
    assert "on meta" in str(native.reason_against(copy.deepcopy(model).to("meta")))
    model.forward = None  # type: ignore[method-assign, assignment]
    assert native.reason_against(model) == "the model's forward is not Gemma 3's own"


@pytest.fixture
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder without the compiled file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "gemmule"
    native._library.cache_clear()


def test_without_a_compiler_the_plain_way_is_taken(forgotten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    model = lively_model(tiny_config())
    assert tokens_of(model, "auto") == tokens_of(model, "plain")
    words = "decoding 'native': no C compiler .cc. was found; use 'plain' or 'auto'"
    with pytest.raises(DeviceError, match=words):
        tokens_of(model, "native")


def test_a_compiler_that_fails_is_quoted(forgotten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'step.c: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(DeviceError, match=f"decoding 'native': {compiler} did not compile it: step.c: out of luck"):
        tokens_of(lively_model(tiny_config()), "native")


@needs_compiler
def test_it_is_compiled_once(forgotten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = lively_model(tiny_config()), []
    real = native._compile
    monkeypatch.setattr(native, "_compile", lambda *given: calls.append(given) or real(*given))
    for _ in range(2):
        tokens_of(model, "native")
        native._library.cache_clear()
    assert len(calls) == 1
    assert [file.suffix for file in forgotten.iterdir()] == [".so"]


@needs_compiler
def test_a_compiler_that_knows_few_options_will_do(
    forgotten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    options = "*-fopenmp*|*-mprefer*"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {options}) echo unknown >&2; exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    model = lively_model(tiny_config())
    assert tokens_of(model, "native") == tokens_of(model, "plain")


def test_the_structures_of_c_and_python_have_the_same_sizes(tmp_path: Path) -> None:
    compiler = native.shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = tmp_path / "sizes.c"
    program.write_text(
        f'#include "{native.SOURCE}"\n#include <stdio.h>\n'
        'int main(void) { printf("%zu %zu %zu", sizeof(Matrix), sizeof(Layer), sizeof(Model)); }\n'
    )
    subprocess.run([compiler, str(program), "-o", str(tmp_path / "sizes"), "-lm"], check=True)
    sizes = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout.split()
    ours = [native.ctypes.sizeof(kind) for kind in (native._Matrix, native._Layer, native._Model)]
    assert ours == [int(size) for size in sizes]
