"""The rule of `gemmule grow`: more time, more text and faster machines make larger models; bounds hold."""

from itertools import pairwise

import pytest
import torch

from gemmule.data.report import LENGTHS, SplitReport
from gemmule.errors import RecipeError
from gemmule.grow.choose import (
    Budget,
    Choice,
    choose,
    choose_context,
    choose_continuation,
    choose_vocabulary,
    holdout_for,
)
from gemmule.grow.machine import Speed, measure
from gemmule.grow.shapes import parameters
from gemmule.model.config import Gemma3Config
from gemmule.model.init import meta_model
from gemmule.settings import check_recipe
from gemmule.train.recipe import Recipe

LAPTOP = Speed(torch.device("cpu"), "fp32", {128: 5e10, 512: 1e11}, {128: 5e10, 512: 1e11})
GPU = Speed(torch.device("cpu"), "bf16", {128: 2e12, 2048: 2e14}, {128: 2e12, 2048: 2e14})
BOOK = 2_000_000


def text(size: int, tokens_of_a_document: int = 200) -> SplitReport:
    documents = max(1, size // (4 * tokens_of_a_document))
    lengths = [documents if low <= tokens_of_a_document < high else 0 for low, high in pairwise(LENGTHS)]
    return SplitReport(
        source="x", read=documents, kept=documents, bytes=size, tokens=max(1, size // 4),
        longest=tokens_of_a_document, lengths=tuple(lengths),
    )  # fmt: skip


def chosen(size: int, minutes: float, speed: Speed = LAPTOP, wanted: int | None = None) -> Choice:
    budget = Budget(minutes, wanted)
    vocab_size, _ = choose_vocabulary(size, budget, speed)
    return choose(text(size), vocab_size, budget, speed)


def size_of(choice: Choice, vocab_size: int = 4096) -> int:
    return parameters(Gemma3Config(vocab_size=vocab_size, **choice.table["model"]))


def test_more_time_makes_larger_models() -> None:
    sizes = [size_of(chosen(100_000_000, minutes)) for minutes in (1, 5, 20, 60, 240)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10 * sizes[0]


def test_a_faster_machine_makes_larger_models() -> None:
    assert size_of(chosen(10**9, 10, GPU)) > 10 * size_of(chosen(10**9, 10, LAPTOP))


def test_little_text_makes_small_models_that_watch_validation() -> None:
    little, much = chosen(100_000, 240), chosen(10**8, 240)
    assert size_of(little, 512) <= 5 * 100_000 < size_of(much)
    assert little.epochs <= 40
    assert little.table["train"]["steps"] < 100_000, "the run ends before the time is up"
    assert little.table["train"]["final_model"] == "best"
    assert little.table["train"]["early_stopping"] == 4
    assert little.table["model"]["dropout"] > 0
    assert "early_stopping" not in much.table["train"]
    assert "dropout" not in much.table["model"]


def test_the_vocabulary_grows_with_the_text_and_the_time() -> None:
    def entries(size: int, minutes: float) -> int:
        return choose_vocabulary(size, Budget(minutes), LAPTOP)[0]

    sizes = [entries(size, 60) for size in (10_000, 200_000, BOOK, 10**8)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 512
    assert sizes[-1] >= 4096
    assert entries(10**8, 1) <= entries(10**8, 600)


@pytest.mark.parametrize("speed", [LAPTOP, GPU])
@pytest.mark.parametrize("minutes", [0.05, 1, 10, 600])
@pytest.mark.parametrize("size", [300, 20_000, BOOK, 10**9])
def test_every_choice_is_a_recipe_with_reasons(size: int, minutes: float, speed: Speed) -> None:
    choice = chosen(size, minutes, speed)
    recipe = check_recipe({"data": {"train": "x.txt"}, **choice.table}, Recipe, "chosen")
    assert choice.reasons
    for key, reason in choice.reasons.items():
        section, name = key.split(".")
        assert name in getattr(recipe, section).model_fields_set
        assert reason
        assert "\n" not in reason
    assert recipe.train.validate_every <= max(1, recipe.train.steps)


def test_a_wanted_size_is_kept() -> None:
    for wanted in (1_000_000, 5_000_000, 50_000_000):
        choice = choose(text(BOOK), 4096, Budget(10, wanted), LAPTOP)
        assert size_of(choice) == pytest.approx(wanted, rel=0.25)


def test_a_size_that_no_shape_has_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"--size = 10: no shape has about so many .* use 3\d\d,\d\d\d to"):
        choose(text(BOOK), 4096, Budget(10, 10), LAPTOP)


def test_too_little_text_and_too_little_time_are_said() -> None:
    assert "3,000 bytes of text are enough to learn its characters" in chosen(3_000, 10).warnings[0]
    slow = Speed(torch.device("cpu"), "fp32", {128: 1e8}, {128: 1e8})
    assert "fit into the time on this machine, which teach little" in chosen(BOOK, 1, slow).warnings[0]
    assert chosen(BOOK, 10).warnings == ()


def test_the_context_is_long_enough_for_most_documents() -> None:
    assert [choose_context(text(BOOK, length))[0] for length in (50, 200, 400, 100_000)] == [128, 256, 512, 256]
    assert choose_context(text(BOOK, 200))[1] == "at least 75% of the documents have at most so many tokens"
    assert "most documents are longer" in choose_context(text(BOOK, 100_000))[1]


def test_the_context_is_shorter_than_a_text_of_few_tokens() -> None:
    for size in (300, 1000, 3000):
        context, _ = choose_context(text(size))
        assert 1 <= context < text(size).tokens


def test_a_share_of_the_text_is_held_out() -> None:
    assert [holdout_for(size)[0] for size in (300, 1000, 1_000_000, 10**9)] == [0.257, 0.1, 0.05, 0.01]


def test_a_model_that_exists_learns_at_a_rate_for_its_size() -> None:
    own = Gemma3Config(vocab_size=4096, hidden_size=128, num_hidden_layers=4, head_dim=64, num_attention_heads=2)
    small, large = (choose_continuation(config, text(BOOK), Budget(10), LAPTOP) for config in (own, Gemma3Config()))
    rates = [each.table["optimizer"]["learning_rate"] for each in (small, large)]
    assert rates[0] > rates[1] == pytest.approx(2e-5, rel=0.05)
    assert "model" not in small.table
    check_recipe({"data": {"train": "x.txt"}, **small.table}, Recipe, "chosen")


def test_parameters_are_those_of_the_model() -> None:
    config = Gemma3Config(vocab_size=512, hidden_size=64, num_hidden_layers=2, head_dim=32, num_attention_heads=2)
    assert parameters(config) == sum(p.numel() for p in meta_model(config).parameters())


def test_this_machine_is_measured_and_a_larger_model_takes_longer() -> None:
    speed = measure(torch.device("cpu"))
    assert speed.precision in {"bf16", "fp32"}
    assert all(rate > 1e6 for rate in (*speed.layer.values(), *speed.head.values()))
    config = Gemma3Config(vocab_size=512, hidden_size=64, num_hidden_layers=2, head_dim=32, num_attention_heads=2)
    seconds = [
        speed.step_seconds(config.replace(num_hidden_layers=layers), 8, 128, compiled=False) for layers in (2, 4)
    ]
    assert 0 < seconds[0] < seconds[1]
    assert speed.step_seconds(config, 8, 128, compiled=True) < seconds[0]
    assert "GFLOP/s at hidden size 128" in str(speed)
