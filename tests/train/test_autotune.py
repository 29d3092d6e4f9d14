from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gemmule.errors import DeviceError, RecipeError
from gemmule.model.attention import KERNELS
from gemmule.train import autotune
from gemmule.train.autotune import Trial, disagreement, settle_precision, time_kernels, time_precisions, tune
from gemmule.train.settings import TrainSettings
from tiny import tiny_config

CPU = torch.device("cpu")
SHAPE = tiny_config(initializer_range=0.2)  # so that attention weights differ from each other


def trial(rows: int = 3, context: int = 23, masked: bool = False, **changes: Any) -> Trial:
    return Trial(SHAPE.replace(**changes), rows, context, masked, CPU)


def settings(attention: str, **changes: Any) -> TrainSettings:
    return TrainSettings.model_validate({"steps": 1, "attention": attention, "precision": "fp32"} | changes)


# --- speed ---


def test_a_trial_times_each_kernel_there_and_back() -> None:
    times = time_kernels(tiny_config(), 40, torch.float32, CPU, False)
    assert set(times) == {"sdpa", "block-local"}
    assert all(0 < seconds < 10 for seconds in times.values())


def test_long_rows_within_the_window_need_no_trial() -> None:
    assert not time_kernels(tiny_config(sliding_window=4096), 2048, torch.float32, CPU, False)


def test_a_kernel_that_does_not_run_is_told_and_not_taken(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("no backward pass\non this device")

    monkeypatch.setitem(KERNELS, "block-local", broken)
    assert set(time_kernels(tiny_config(), 40, torch.float32, CPU, False)) == {"sdpa"}
    assert messages == ["train.attention: block-local does not run here: no backward pass"]


@pytest.mark.parametrize("best", ["sdpa", "block-local"])
def test_auto_becomes_the_fastest_and_says_why(best: str, monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    times = {"sdpa": 0.002, "block-local": 0.003} | {best: 0.001}
    monkeypatch.setattr(autotune, "time_kernels", lambda *_: times)
    assert tune(trial(), settings("auto")).attention == best
    (sentence,) = messages
    assert f"train.attention: {best} is the fastest here" in sentence
    assert f"{best} 1.0 ms" in sentence


def test_where_there_is_nothing_to_choose_it_is_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "time_kernels", lambda *_: {})
    assert tune(trial(), settings("auto")).attention == "sdpa"


def test_a_kernel_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "time_kernels", lambda *_: pytest.fail("nothing to try"))
    assert tune(trial(), settings("block-local")).attention == "block-local"


def test_a_kernel_that_cannot_train_here_is_refused() -> None:
    with pytest.raises(RecipeError, match=r'train\.attention = "flex": needs a GPU'):
        tune(trial(), settings("flex"))


def test_number_formats_are_timed() -> None:
    seconds = time_precisions(trial())
    assert set(seconds) == {"bf16", "fp32"}
    assert all(0 < value < 10 for value in seconds.values())


def test_a_number_format_that_is_far_slower_is_timed_by_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # bf16 on a processor without instructions for it: a layer forward and backward took half a minute.
    products = {"bf16": 0.02, "fp32": 0.0004}
    monkeypatch.setattr(autotune, "_product_seconds", products.__getitem__)
    monkeypatch.setattr(autotune, "_Layer", None)
    assert time_precisions(trial()) == products


@pytest.mark.parametrize("best", ["bf16", "fp32"])
def test_the_number_format_is_the_faster_one_and_it_is_said(
    best: str, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    seconds = {"bf16": 0.3, "fp32": 0.3} | {best: 0.2}
    monkeypatch.setattr(autotune, "time_precisions", lambda *_: seconds)
    assert settle_precision(trial(), "auto") == best
    other = {"bf16": "fp32", "fp32": "bf16"}[best]
    assert messages == [f"train.precision: {best} is 1.50 times as fast as {other} here"]
    assert settle_precision(trial(), other) == other


# --- agreement with the reference ---


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["reference", "sdpa", "block-local"])
def test_kernels_agree_with_the_reference(kernel: str, precision: autotune.Precision, masked: bool) -> None:
    assert disagreement(trial(masked=masked), kernel, precision, compiled=False) is None


@pytest.mark.parametrize("rows", [1, 7])
def test_the_reference_takes_as_many_rows_as_it_can_hold(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(autotune, "_SCORES_AT_ONCE", 2 * 4 * 23 * 23)
    assert disagreement(trial(rows), "block-local", "fp32", compiled=False) is None
    monkeypatch.setattr(autotune, "_SCORES_AT_ONCE", 1)  # of rows that are too long for it, none
    assert disagreement(trial(rows), "block-local", "fp32", compiled=False) is None


class Wrong(torch.autograd.Function):
    """The identity, of which a gradient goes wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.spoil(gradients[0]), None


def late(gradient: Tensor) -> Tensor:
    return gradient.where(torch.arange(gradient.shape[2])[:, None] < gradient.shape[2] - 3, gradient * 0.5)


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "not a number": (lambda gradient: gradient.clone().fill_(torch.nan), "is not finite"),
    "one number": (lambda gradient: gradient.index_fill(2, torch.tensor(5), torch.inf), "is not finite"),
    "half": (lambda gradient: gradient * 0.5, r"is off by \d\d% of its length"),
    "the last tokens": (late, r"is off by \d+% of its length"),
    "another row's": (lambda gradient: gradient.roll(1, 0), r"is off by \d+% of its length"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", sorted(FAULTS))
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_wrong_gradients_are_noticed_where_the_output_is_right(
    monkeypatch: pytest.MonkeyPatch, precision: autotune.Precision, fault: str, place: str
) -> None:
    """As with the kernel that gave NaN gradients of the keys, and the right loss."""
    sdpa, (spoil, messages) = KERNELS["sdpa"], FAULTS[fault]

    def wrong(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        given = {"query": query, "key": key, "value": value}
        given[place] = Wrong.apply(given[place], spoil)  # type: ignore[no-untyped-call]
        return sdpa(*given.values(), *rest)

    monkeypatch.setitem(KERNELS, "sdpa", wrong)
    reason = disagreement(trial(), "sdpa", precision, compiled=False)
    assert reason is not None
    assert f"layer, 3 x 23 tokens in {precision}, {messages}".split(", is")[0] in reason


def test_a_wrong_output_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = KERNELS["sdpa"]
    monkeypatch.setitem(KERNELS, "sdpa", lambda *given: sdpa(*given).roll(1, 2))
    assert "the output of a local layer" in str(disagreement(trial(), "sdpa", "fp32", compiled=False))


def test_auto_passes_over_a_fast_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    block_local = KERNELS["block-local"]
    monkeypatch.setitem(KERNELS, "block-local", lambda *given: block_local(*given).roll(1, 2))
    monkeypatch.setattr(autotune, "time_kernels", lambda *_: {"sdpa": 2.0, "block-local": 1.0})
    assert tune(trial(), settings("auto")).attention == "sdpa"
    assert messages[1].startswith(
        "train.attention: block-local is not used: on this machine it differs from the reference: the output of a "
        "local layer, 3 x 23 tokens in fp32, is off by "
    )


def test_a_kernel_that_is_named_and_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    block_local = KERNELS["block-local"]
    monkeypatch.setitem(KERNELS, "block-local", lambda *given: block_local(*given).roll(1, 2))
    with pytest.raises(
        DeviceError, match=r"train\.attention = 'block-local': computes something else than the reference; try"
    ):
        tune(trial(), settings("block-local"))


def test_where_compiled_layers_are_wrong_the_run_goes_on_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr(autotune, "reason_not_to_compile", lambda _: None)
    monkeypatch.setattr(autotune, "disagreement", lambda *given: "NaN" if given[-1] else None)
    settled = tune(trial(), settings("sdpa", compile=True))
    assert (settled.attention, settled.compile) == ("sdpa", False)
    assert messages == [
        "train.attention: sdpa, compiled, is not used: on this machine it differs from the reference: NaN",
        "train.compile: disabled, because compiled layers differ from the reference on this machine",
    ]


def test_a_machine_without_a_compiler_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    monkeypatch.setattr(autotune, "reason_not_to_compile", lambda _: "no C++ compiler")
    assert not tune(trial(), settings("sdpa", compile=True)).compile
    assert messages == ["train.compile: disabled, because this machine cannot compile: no C++ compiler"]
