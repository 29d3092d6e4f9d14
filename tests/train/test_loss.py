from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from gemmule.data import batches
from gemmule.model.gemma3 import all_logits
from gemmule.train import loss as loss_module
from gemmule.train.loss import IGNORED, summed_loss

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


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 5),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    at_once=st.integers(1, 8 * VOCABULARY),
    seed=st.integers(0, 9),
)
def test_chunks_change_neither_value_nor_gradient(
    rows: int, length: int, ignored: float, at_once: int, seed: int
) -> None:
    hidden, targets, vocabulary = draw(rows, length, ignored, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
        value = summed_loss(targets)(hidden, vocabulary)
        gradients = torch.autograd.grad(value, (hidden, vocabulary))
    expected = plain_loss(hidden, targets, vocabulary)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected + 0 * hidden.sum() + 0 * vocabulary.sum(), (hidden, vocabulary))
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


def test_no_more_logits_than_the_limit_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        logits = all_logits(hidden, vocabulary)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(loss_module, "all_logits", watched)
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 4 * VOCABULARY)
    hidden, targets, vocabulary = draw(3, 5, 0.2, 0)
    summed_loss(targets)(hidden, vocabulary).backward()
    assert sizes == [4 * VOCABULARY] * 3 + [3 * VOCABULARY] + sizes[4:]
    assert len(sizes) == 8, "the way back makes the logits again"


def test_chunks_keep_no_logits_for_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets, vocabulary = draw(3, 5, 0.2, 0)
    for at_once, kept in ((15 * VOCABULARY, True), (4 * VOCABULARY, False)):
        monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, into=saved: into.append(tensor) or tensor, id):
            summed_loss(targets)(hidden, vocabulary)
        assert any(tensor.shape[-1:] == (VOCABULARY,) for tensor in saved) == kept


def test_half_precision_states_are_summed_in_fp32() -> None:
    hidden, targets, vocabulary = draw(2, 4, 0.2, 0)
    value = summed_loss(targets)(hidden.bfloat16(), vocabulary.bfloat16())
    assert value.dtype == torch.float32
    expected = plain_loss(hidden.bfloat16().float(), targets, vocabulary.bfloat16().float())
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
