import pytest
import torch

from gemmule.errors import RecipeError
from gemmule.model.attention import KERNELS
from gemmule.train import run as run_module
from gemmule.train.probe import time_kernels
from gemmule.train.run import Recipe, settle_attention
from tiny import tiny_config

CPU = torch.device("cpu")


def recipe(attention: str, context: int = 32) -> Recipe:
    train = {"steps": 1, "attention": attention, "context": context, "compile": True}
    return Recipe.model_validate({"data": {"train": "storybook"}, "train": train})


def test_a_trial_times_each_kernel_there_and_back() -> None:
    times = time_kernels(tiny_config(), 40, torch.float32, CPU, False, pytest.fail)
    assert set(times) == {"sdpa", "folded"}
    assert all(0 < seconds < 10 for seconds in times.values())


def test_long_rows_within_the_window_need_no_trial() -> None:
    assert not time_kernels(tiny_config(sliding_window=4096), 2048, torch.float32, CPU, False, pytest.fail)


def test_a_kernel_that_does_not_run_is_told_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("no way back\non this device")

    monkeypatch.setitem(KERNELS, "folded", broken)
    said: list[str] = []
    assert set(time_kernels(tiny_config(), 40, torch.float32, CPU, False, said.append)) == {"sdpa"}
    assert said == ["train.attention: folded does not run here: no way back"]


@pytest.mark.parametrize("best", ["sdpa", "folded"])
def test_auto_becomes_the_fastest_and_says_why(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"sdpa": 0.002, "folded": 0.003} | {best: 0.001}
    monkeypatch.setattr(run_module, "time_kernels", lambda *_: times)
    said: list[str] = []
    assert settle_attention(recipe("auto"), CPU, "bf16", said.append).train.attention == best
    (sentence,) = said
    assert f"train.attention: {best} is the fastest here" in sentence
    assert f"{best} 1.0 ms" in sentence


def test_where_there_is_nothing_to_choose_it_is_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "time_kernels", lambda *_: {})
    assert settle_attention(recipe("auto"), CPU, "bf16", print).train.attention == "sdpa"


def test_a_kernel_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "time_kernels", lambda *_: pytest.fail("nothing to try"))
    assert settle_attention(recipe("folded"), CPU, "bf16", print).train.attention == "folded"


def test_a_kernel_that_cannot_train_here_is_refused() -> None:
    with pytest.raises(RecipeError, match=r'train\.attention = "flex": needs a GPU'):
        settle_attention(recipe("flex"), CPU, "bf16", print)
