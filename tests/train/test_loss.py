from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from gemmule.data import batches
from gemmule.train import loss as loss_module
from gemmule.train.log_probabilities import target_log_probabilities
from gemmule.train.loss import IGNORED, rows_at_once, summed_loss
from runs import number_printed_by

VOCABULARY = 11


def test_ignored_targets_are_those_that_batches_mark() -> None:
    assert batches.IGNORED == IGNORED


def draw(rows: int, length: int, ignored: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (B,T,D), targets (B,T) and a vocabulary (V,D)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, 6, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < ignored] = IGNORED
    return hidden, targets, torch.randn(VOCABULARY, 6, generator=generator).requires_grad_()


def plain_loss(hidden: Tensor, targets: Tensor, vocabulary: Tensor) -> Tensor:
    """One target after the other, as the definition has it."""
    total = torch.zeros(())
    for row, goals in zip(hidden, targets, strict=True):
        for state, goal in zip(row, goals, strict=True):
            if goal != IGNORED:
                total = total - functional.log_softmax(vocabulary @ state, dim=0)[goal]
    return total


in_chunks = given(
    rows=st.integers(1, 3),
    length=st.integers(1, 5),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    at_once=st.integers(1, 8 * VOCABULARY),
    seed=st.integers(0, 9),
)


@in_chunks
def test_chunks_change_neither_value_nor_gradient(
    rows: int, length: int, ignored: float, at_once: int, seed: int
) -> None:
    hidden, targets, vocabulary = draw(rows, length, ignored, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
        patch.setattr(loss_module, "VOCABULARY_CHUNK", 4)
        value = summed_loss(targets)(hidden, vocabulary)
        gradients = torch.autograd.grad(value, (hidden, vocabulary))
    expected = plain_loss(hidden, targets, vocabulary)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected + 0 * hidden.sum() + 0 * vocabulary.sum(), (hidden, vocabulary))
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


def test_no_more_logits_than_the_limit_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    make = loss_module._losses_and_slopes

    def watched(logits: Tensor, targets: Tensor, sloped: bool) -> tuple[Tensor, Tensor | None]:
        sizes.append(logits.numel())
        return make(logits, targets, sloped)

    monkeypatch.setattr(loss_module, "losses_and_gradients", lambda _compiled: watched)
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 4 * VOCABULARY)
    hidden, targets, vocabulary = draw(3, 5, 0.2, 0)
    summed_loss(targets)(hidden, vocabulary).backward()
    assert sizes == [4 * VOCABULARY] * 3 + [3 * VOCABULARY]


def test_chunks_keep_no_logits_for_the_way_back() -> None:
    hidden, targets, vocabulary = draw(3, 5, 0.2, 0)
    value = summed_loss(targets)(hidden, vocabulary)
    kept: Any = value.grad_fn
    assert [tuple(tensor.shape) for tensor in kept.gradients] == [(15, 6), (VOCABULARY, 6)]
    assert not kept.saved_tensors


def test_chunks_on_a_cpu_fit_its_caches_and_have_rows_enough() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert rows_at_once(4096, cpu) == 1024
    assert rows_at_once(32_768, cpu) == 512
    assert rows_at_once(262_144, cpu) == 64
    assert rows_at_once(262_144, gpu) == 256
    assert rows_at_once(4096, gpu) == 16_384


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns itself
def test_compiled_losses_are_the_same() -> None:
    hidden, targets, vocabulary = draw(3, 5, 0.4, 0)
    results = []
    for compiled in (False, True):
        value = summed_loss(targets, compiled)(hidden, vocabulary)
        results.append((value, *torch.autograd.grad(value, (hidden, vocabulary))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


LARGE = """
import torch
from torch.nn import functional
from gemmule.processes import peak_memory, resident_memory
from gemmule.train.loss import summed_loss

hidden, vocabulary = torch.randn(1, 16384, 640, requires_grad=True), torch.randn(262144, 640).mul_(0.02)
vocabulary.requires_grad_()
targets = torch.randint(262144, (1, 16384))
before = resident_memory()
with torch.autocast("cpu", torch.bfloat16):
    loss = summed_loss(targets)(hidden, vocabulary)
loss.backward()
print((peak_memory() - before) / 2**30)
few = slice(0, 64)
with torch.autocast("cpu", torch.bfloat16):
    one = summed_loss(targets[:, few])(hidden[:, few], vocabulary)
    plain = functional.cross_entropy((hidden[0, few] @ vocabulary.T).float(), targets[0, few], reduction="sum")
torch.testing.assert_close(one, plain, rtol=1e-3, atol=0)
for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, vocabulary)) for x in (one, plain))):
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.01
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_quarter_of_a_million_words_take_a_gigabyte_above_the_weights_gradients_included() -> None:
    copy = 262_144 * 640 * 2 / 2**30  # the weights in the precision of autocast
    assert number_printed_by(LARGE) < 1 + copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_loss_is_summed_in_fp32_whatever_torchs_default_dtype(dtype: torch.dtype) -> None:
    hidden, targets, vocabulary = draw(2, 4, 0.2, 0)
    expected = summed_loss(targets)(hidden, vocabulary)
    torch.set_default_dtype(dtype)
    try:
        value = summed_loss(targets)(hidden, vocabulary)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (value.dtype, value.item()) == (torch.float32, expected.item())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed_or_held(
    mode: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter asks for its gradient under no_grad, too; validation took three times as long."""
    hidden, targets, vocabulary = draw(3, 5, 0.2, 0)
    vocabulary = torch.nn.Parameter(vocabulary.detach())
    with_gradients = summed_loss(targets)(hidden, vocabulary)
    for owner, name in ((loss_module, "_accumulate_matmul"), (torch, "zeros_like")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("a gradient is made"))
    with mode():
        value = summed_loss(targets)(hidden, vocabulary)
    assert value.item() == with_gradients.item()
    assert not value.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "vocabulary"])
def test_what_is_frozen_gets_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets, vocabulary = draw(3, 5, 0.2, 0)
    both = torch.autograd.grad(summed_loss(targets)(hidden, vocabulary), (hidden, vocabulary))
    given = {"hidden": hidden.detach(), "vocabulary": vocabulary.detach()}
    other = "vocabulary" if frozen == "hidden" else "hidden"
    given[other].requires_grad_()
    value = summed_loss(targets)(given["hidden"], given["vocabulary"])
    kept: Any = value.grad_fn
    assert [gradient is None for gradient in kept.gradients] == [name == frozen for name in given]
    (gradient,) = torch.autograd.grad(value, given[other])
    assert torch.equal(gradient, both[list(given).index(other)])


WITHOUT_GRADIENTS = """
import torch
from gemmule.processes import peak_memory, resident_memory
from gemmule.train.loss import summed_loss

vocabulary = torch.nn.Parameter(torch.zeros(262144, 640))
hidden, targets = torch.randn(1, 256, 640), torch.randint(262144, (1, 256))
with torch.no_grad():
    summed_loss(targets[:, :1])(hidden[:, :1], vocabulary)
    before = resident_memory()
    summed_loss(targets)(hidden, vocabulary)
print((peak_memory() - before) / 2**30)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_validation_with_a_quarter_of_a_million_words_holds_a_chunk_of_logits() -> None:
    """And not the vocabulary's gradient, which is 640 MiB."""
    assert number_printed_by(WITHOUT_GRADIENTS) < 0.4


def test_half_precision_states_are_summed_in_fp32() -> None:
    hidden, targets, vocabulary = draw(2, 4, 0.2, 0)
    value = summed_loss(targets)(hidden.bfloat16(), vocabulary.bfloat16())
    assert value.dtype == torch.float32
    expected = plain_loss(hidden.bfloat16().float(), targets, vocabulary.bfloat16().float())
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)


@in_chunks
def test_log_probabilities_of_targets_are_those_of_log_softmax(
    rows: int, length: int, ignored: float, at_once: int, seed: int
) -> None:
    hidden, targets, vocabulary = draw(rows, length, ignored, seed)
    weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
        patch.setattr(loss_module, "VOCABULARY_CHUNK", 4)
        found = target_log_probabilities(targets)(hidden, vocabulary)
        gradients = torch.autograd.grad((found * weights).sum(), (hidden, vocabulary))
    known = targets != IGNORED
    logits = functional.log_softmax(hidden @ vocabulary.T, dim=-1)
    expected = logits.gather(2, targets.where(known, 0)[..., None])[..., 0].where(known, 0.0)
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), (hidden, vocabulary)), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)
    assert -found.sum().item() == pytest.approx(summed_loss(targets)(hidden, vocabulary).item(), rel=1e-5, abs=1e-6)
