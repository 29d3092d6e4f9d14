"""Adapters on a frozen model: the identity at first, then what their weights say, merged or not."""

from typing import Any

import pytest
import torch
from torch import nn

from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import meta_model
from gemmule.model.lora import (
    MATRICES,
    LoRA,
    LoRALinear,
    RowsEmbedding,
    add_lora,
    changes_nothing,
    init_lora,
    lora_of,
    merge,
    merged_weights,
)
from gemmule.train.loss import summed_loss
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

CONFIG = tiny_config(tie_word_embeddings=True)
KINDS: dict[str, LoRA] = {
    "lora": LoRA(4, 8.0),
    "rslora": LoRA(4, 8.0, rank_stabilized=True),
    "dora": LoRA(4, 8.0, dora=True),
    "rows": LoRA(4, 8.0, rows=(3, 12, 47)),
    "two matrices": LoRA(4, 8.0, targets=("attention.query", "attention.value")),
    "dropout": LoRA(4, 8.0, dropout=0.5, dora=True),
}


def adapted(lora: LoRA, lively: bool = True, base: torch.dtype = torch.float32) -> Gemma3:
    """A model with adapters whose every number is far from its first value, or that are still the identity."""
    model = lively_model(CONFIG).to(base)
    add_lora(model, lora)
    init_lora(model, seed=7)
    if lively:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_begins_as_the_identity(kind: str) -> None:
    tokens = some_tokens(CONFIG)
    model = adapted(KINDS[kind], lively=False)
    assert changes_nothing(model)
    with torch.no_grad():
        off = greatest_difference(model(tokens), lively_model(CONFIG)(tokens))
    assert off < 1e-5 if KINDS[kind].dora else off == 0
    assert not changes_nothing(adapted(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_computes_what_the_adapter_does(kind: str) -> None:
    tokens, model = some_tokens(CONFIG), adapted(KINDS[kind])
    plain = merge(model)
    with torch.no_grad():
        base, one, other = lively_model(CONFIG)(tokens), model(tokens), plain(tokens)
    assert greatest_difference(base, one) > 0.1
    assert greatest_difference(one, other) < 1e-4
    assert torch.equal(one.argmax(-1), other.argmax(-1))
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in meta_model(CONFIG).named_parameters()}
    assert not any(isinstance(module, LoRALinear | RowsEmbedding) for module in plain.modules())


def test_scale_is_alpha_over_the_rank_or_its_root() -> None:
    assert LoRA(16, 8.0).scale == 0.5
    assert LoRA(16, 8.0, rank_stabilized=True).scale == 2.0
    x, results = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)), []
    for lora in (LoRA(4, 8.0), LoRA(4, 16.0), LoRA(4, 8.0, rank_stabilized=True)):
        layer = LoRALinear(nn.Linear(24, 32, bias=False), lora)
        with torch.no_grad():
            layer.weight.zero_()
            for parameter in (layer.lora_a, layer.lora_b):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        results.append(layer(x))
    assert torch.allclose(results[1], 2 * results[0])
    assert torch.allclose(results[2], 2 * results[0])


def test_dora_rows_have_the_length_of_their_magnitude() -> None:
    model = adapted(KINDS["dora"])
    for name, weight in merged_weights(model):
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, LoRALinear):
            assert module.magnitude is not None
            assert torch.allclose(weight.norm(dim=1), module.magnitude.abs(), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_gets_a_gradient_and_all_of_it(kind: str) -> None:
    model, lora = adapted(KINDS[kind]).train(), KINDS[kind]
    tokens = some_tokens(CONFIG)
    model(tokens, output_head=summed_loss(tokens.roll(-1, 1))).backward()
    for name, parameter in model.named_parameters():
        learns = name.endswith((".lora_a", ".lora_b", ".magnitude", ".rows"))
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns
    layers = sum(isinstance(module, LoRALinear) for module in model.modules())
    assert layers == CONFIG.num_hidden_layers * len(lora.targets)
    assert lora_of(model) == lora
    assert lora_of(lively_model(CONFIG)) is None


def test_rows_learn_as_those_of_a_whole_tied_embedding_do() -> None:
    ids, tokens = [3, 12, 47], some_tokens(CONFIG)
    assert set(ids) & set(tokens.flatten().tolist()), "as an input, too, and not only in the head"
    model, whole = adapted(KINDS["rows"], lively=False), lively_model(CONFIG)
    for each in (model, whole):
        each(tokens, output_head=summed_loss(tokens.roll(-1, 1))).backward()
    assert isinstance(model.embedding, RowsEmbedding)
    found, wanted = model.embedding.rows.grad, whole.embedding.weight.grad
    assert found is not None
    assert wanted is not None
    assert greatest_difference(found, wanted[ids]) < 1e-6 * wanted.abs().max()


def test_all_seven_matrices_are_the_default() -> None:
    block = lively_model(CONFIG).blocks[0]
    assert sorted(MATRICES) == sorted(name for name, module in block.named_modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("kind", ["lora", "dora", "rows"])
def test_a_base_in_bf16_keeps_the_adapter_in_fp32(kind: str) -> None:
    model = adapted(KINDS[kind], base=torch.bfloat16)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    rounded = merge(model, torch.bfloat16)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    for (name, values), (_, once) in zip(rounded.named_parameters(), merge(model).named_parameters(), strict=True):
        assert torch.equal(values, once.bfloat16()), name


def test_first_weights_are_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> Any:
        model = adapted(KINDS["lora"], lively=False)
        init_lora(model, seed)
        return torch.cat([module.lora_a.flatten() for module in model.modules() if isinstance(module, LoRALinear)])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    largest = drawn(1).abs().max()
    assert 0.9 / 24**0.5 < largest <= 1 / 24**0.5


def test_a_merge_shares_what_it_does_not_change() -> None:
    model = adapted(KINDS["lora"])
    assert merge(model).norm.weight.data_ptr() == model.norm.weight.data_ptr()
    before = model.blocks[0].get_parameter("mlp.down.weight").clone()
    merge(model)
    assert torch.equal(model.blocks[0].get_parameter("mlp.down.weight"), before)
