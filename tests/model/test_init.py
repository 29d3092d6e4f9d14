import math
from itertools import combinations

import pytest
import torch
from torch.nn import functional

from gemmule.model.gemma3 import Block, Gemma3, RMSNorm
from gemmule.model.init import init_weights, meta_model
from tiny import greatest_difference, lively_model, some_tokens, tiny_config


def fresh(seed: int = 3, damp_branches: bool = False) -> Gemma3:
    model = Gemma3(tiny_config(tie_word_embeddings=False))
    init_weights(model, seed, damp_branches)
    return model


def test_first_weights_are_a_pure_function_of_the_seed() -> None:
    lively = lively_model(tiny_config(tie_word_embeddings=False))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    init_weights(lively, 3)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    for name, weight in fresh(3).state_dict().items():
        assert torch.equal(weight, lively.state_dict()[name]), name
    torch.set_default_dtype(torch.bfloat16)
    try:
        init_weights(lively, 3, damp_branches=True)
        assert meta_model(lively.config).norm.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in fresh(3, damp_branches=True).state_dict().items():
        assert torch.equal(weight, lively.state_dict()[name]), "whatever torch's default dtype is"
    other = fresh(4).state_dict()
    assert not any(
        torch.equal(weight, other[name]) for name, weight in fresh(3).state_dict().items() if weight.ndim > 1
    )


def test_matrices_are_normal_and_no_two_alike() -> None:
    config = tiny_config(initializer_range=0.5, hidden_size=64, intermediate_size=96, vocab_size=64)
    model = Gemma3(config)
    init_weights(model, 0)
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    for name, weight in matrices.items():
        assert weight.mean().item() == pytest.approx(0, abs=0.05), name
        assert weight.std().item() == pytest.approx(0.5, rel=0.05), name
    for one, other in combinations(matrices, 2):
        assert not torch.equal(matrices[one].flatten()[:8], matrices[other].flatten()[:8]), (one, other)


def test_norms_begin_at_gain_one() -> None:
    gains = [module.weight for module in fresh().modules() if isinstance(module, RMSNorm)]
    assert len(gains) == 7 * 6 + 1
    assert all(torch.equal(gain, torch.zeros_like(gain)) for gain in gains)


def test_loss_begins_near_that_of_guessing() -> None:
    for tied in (True, False):
        config = tiny_config(vocab_size=500, tie_word_embeddings=tied)
        model = Gemma3(config)
        init_weights(model, 0)
        tokens = some_tokens(config, rows=8)
        with torch.no_grad():
            loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(500), abs=0.05)


def test_damped_branches_shrink_only_the_norms_after_them() -> None:
    damped, plain = fresh(damp_branches=True), fresh()
    gain = 1 / math.sqrt(2 * 7)
    for block in damped.blocks:
        assert isinstance(block, Block)
        for norm in (block.post_attention_norm, block.post_mlp_norm):
            torch.testing.assert_close(1 + norm.weight, torch.full_like(norm.weight, gain))
            torch.nn.init.zeros_(norm.weight)
    for name, weight in damped.state_dict().items():
        assert greatest_difference(weight, plain.state_dict()[name]) == 0, name


def test_damped_branches_keep_the_residual_stream_at_its_first_size() -> None:
    """The embedding enters at the size of its norm; undamped branches add one unit of variance each."""
    sizes = {}
    config = tiny_config(initializer_range=0.2)
    for damp in (True, False):
        model = Gemma3(config)
        init_weights(model, 3, damp)
        with torch.no_grad():
            model.embedding.weight.mul_(5 / math.sqrt(24))  # rows of root mean square 1 after the embedding scale
            model.norm.register_forward_pre_hook(lambda _, x, damp=damp: sizes.update({damp: x[0].square().mean()}))
            model(some_tokens(model.config))
    assert sizes[True].item() == pytest.approx(2, rel=0.3)
    assert sizes[False].item() == pytest.approx(15, rel=0.3)
