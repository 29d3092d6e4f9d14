"""Training is transformers' training: loss, every gradient and every weight over three steps of AdamW."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from twin import MARKS, SHAPES, twin_of

from gemmule.formats.names import tensor_name_pairs
from gemmule.model.attention import KERNELS
from gemmule.train.loss import IGNORED, summed_loss
from tiny import lively_model, some_tokens, tiny_config

pytestmark = MARKS

LENGTH = 23
RELATIVE = 1e-4
# Where each token sees itself alone, queries and keys have no gradient but rounding; all others are longer than this.
FAINT = 3e-3


def distance(ours: Tensor | None, theirs: Tensor) -> float:
    """Return the length of the difference of two tensors over the length of the second, or over FAINT."""
    assert ours is not None
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm().clamp(min=FAINT)).item()


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - {"flex"}))  # FlexAttention has no way back on a CPU
@pytest.mark.parametrize("shape", SHAPES)
def test_three_steps_of_adamw_are_the_same(shape: str, kernel: str) -> None:
    model = lively_model(tiny_config(**SHAPES[shape]), kernel, seed=1).train()
    twin = twin_of(model).train()
    names = list(tensor_name_pairs(model.config.num_hidden_layers, model.config.tie_word_embeddings))
    # The usual epsilon of 1e-8 lets the sign of a gradient that is all rounding decide a whole step.
    optimizers = [torch.optim.AdamW(network.parameters(), lr=2.5e-4, eps=1e-6) for network in (model, twin)]
    for step in range(3):
        tokens = some_tokens(model.config, length=LENGTH, seed=step)
        targets = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        ours = model(tokens, output_head=summed_loss(targets)) / targets.ne(IGNORED).sum()
        theirs = twin(input_ids=tokens, labels=tokens).loss
        assert ours.item() == pytest.approx(theirs.item(), rel=RELATIVE)
        for optimizer, loss in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
        for our_name, their_name in names:
            gradients = model.get_parameter(our_name).grad, twin.get_parameter(their_name).grad
            assert distance(*gradients) <= RELATIVE, (step, our_name)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        for our_name, their_name in names:
            weights = model.get_parameter(our_name), twin.get_parameter(their_name)
            assert distance(*weights) <= RELATIVE, our_name
