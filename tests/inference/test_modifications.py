"""What hangs on a model's modules is noticed, and then every way of decoding calls them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize, prune

from gemmule.errors import DeviceError
from gemmule.inference.engine import stream_tokens
from gemmule.inference.huge_pages import move_to_huge_pages
from gemmule.inference.modifications import find_modification
from gemmule.inference.quantize import quantize
from gemmule.inference.runners import Decoding, slow_decoding_reason
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import MLP, Gemma3
from tiny import lively_model, tiny_config

GREEDY = SamplingSettings(temperature=0)


class Lora(nn.Module):
    """A matrix with a low-rank one beside it, which shows the first one's weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 99 * self.up(self.down(x))


class Flipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 9 * x.flip(-1)


class Backward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


def lora(model: Gemma3) -> None:
    torch.manual_seed(0)
    for block in model.blocks:
        block.mlp.down = Lora(block.mlp.down)


def subclass(model: Gemma3) -> None:
    model.blocks[1].mlp.gate.__class__ = Backward


def biased(model: Gemma3) -> None:
    layer = model.blocks[1].attention.output
    layer.bias = nn.Parameter(torch.ones(layer.out_features))


def other_forward(model: Gemma3) -> None:
    mlp = model.blocks[1].mlp
    mlp.forward = lambda x: MLP.forward(mlp, x).flip(-1)


def longer(model: Gemma3) -> None:
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def shorter(model: Gemma3) -> None:
    del model.blocks[2]


def narrower(model: Gemma3) -> None:
    for mlp in (block.mlp for block in model.blocks):
        for layer, rows in ((mlp.gate, True), (mlp.up, True), (mlp.down, False)):
            layer.weight = nn.Parameter(layer.weight[:17] if rows else layer.weight[:, :17].contiguous())


def other_eps(model: Gemma3) -> None:
    model.blocks[1].attention.query_norm.eps = 99.0


def dampened(model: Gemma3) -> None:
    model.blocks[1].attention.scale *= 3


def other_kernel(model: Gemma3) -> None:
    kernel = model.blocks[1].attention.kernel
    model.blocks[1].attention.kernel = lambda query, *rest: kernel(3 * query, *rest)


def added(model: Gemma3) -> None:
    model.blocks[1].mlp.extra = Flipped()
    model.blocks[1].mlp.register_forward_hook(lambda module, _, result: module.extra(result))


def double(_module: nn.Module, _given: object, result: Tensor) -> Tensor:
    return torch.linspace(-3, 3, result.shape[-1]) + 0 * result


def first_doubled(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (given[0].flip(-1), *given[1:])


CHANGES: dict[str, tuple[Callable[[Gemma3], object], str]] = {
    "hook": (lambda model: model.blocks[2].register_forward_hook(double), "blocks.2 has forward hooks"),
    "pre-hook": (
        lambda model: model.blocks[2].mlp.register_forward_pre_hook(first_doubled),
        "blocks.2.mlp has forward hooks",
    ),
    "hook with keywords": (
        lambda model: model.norm.register_forward_hook(lambda *given: double(given[0], 0, given[-1]), with_kwargs=True),
        "norm has forward hooks",
    ),
    "LoRA": (lora, "blocks.0.mlp.down is a Lora, not a Linear"),
    "subclass": (subclass, "blocks.1.mlp.gate is a Backward, not a Linear"),
    "bias": (biased, "blocks.1.attention.output has a bias"),
    "forward of an instance": (other_forward, "blocks.1.mlp's forward is not Gemma 3's own"),
    "parametrization": (
        lambda model: parametrize.register_parametrization(model.blocks[0].mlp.up, "weight", Flipped()),
        "blocks.0.mlp.up is a ParametrizedLinear, not a Linear",
    ),
    "weight norm": (
        lambda model: parametrizations.weight_norm(model.blocks[0].mlp.up),
        "blocks.0.mlp.up is a ParametrizedLinear, not a Linear",
    ),
    "pruning": (
        lambda model: prune.l1_unstructured(model.blocks[0].mlp.up, "weight", amount=0.9),
        "blocks.0.mlp.up has forward hooks",
    ),
    "more layers": (longer, "blocks.3 is not a module of Gemma 3"),
    "fewer layers": (shorter, "blocks.2 is missing"),
    "pruned neurons": (
        narrower,
        "blocks.0.mlp.gate has a weight of shape torch.Size([17, 24]), not torch.Size([40, 24])",
    ),
    "eps": (other_eps, "blocks.1.attention.query_norm has eps = 99.0, not 1e-06"),
    "scale": (dampened, "blocks.1.attention has scale = "),
    "kernel": (other_kernel, "blocks.1.attention has an attention kernel that is not Gemmule's"),
    "added module": (added, "blocks.1.mlp has forward hooks"),
}


def tokens_of(model: Gemma3, way: Decoding) -> list[list[int | None]]:
    return list(stream_tokens(model, [[2, 40, 41, 42, 43]], 16, frozenset(), GREEDY, decoding=way))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_heeded(change: str) -> None:
    make, sentence = CHANGES[change]
    model = lively_model(tiny_config(num_hidden_layers=3))
    before = tokens_of(model, "auto")
    make(model)
    assert str(find_modification(model)).startswith(sentence)
    assert slow_decoding_reason(model) == find_modification(model)
    if change not in ("more layers", "fewer layers"):  # of those the model itself complains
        assert tokens_of(model, "auto") == tokens_of(model, "plain")
        if change not in ("weight norm",):  # which changes nothing yet
            assert tokens_of(model, "plain") != before
    for way in ("native", "compiled"):
        with pytest.raises(DeviceError) as refused:
            tokens_of(model, way)
        assert f"decoding {way!r}: {sentence}" in str(refused.value)
        assert str(refused.value).endswith("use 'plain' or 'auto'")


@contextmanager
def for_all_modules(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("register", "hook"),
    [(register_module_forward_hook, lambda *_: None), (register_module_forward_pre_hook, lambda *_: None)],
)
def test_hooks_for_all_modules_are_noticed(register: Callable[..., Any], hook: Callable[..., Any]) -> None:
    model = lively_model(tiny_config(num_hidden_layers=3))
    with for_all_modules(register, hook):
        assert slow_decoding_reason(model) == "forward hooks are registered for all modules"
    assert find_modification(model) is None


def test_a_class_whose_forward_was_replaced_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x).flip(-1))
    model = lively_model(tiny_config(num_hidden_layers=3))
    assert find_modification(model) == "blocks.0.mlp's forward is not Gemma 3's own"
    assert tokens_of(model, "auto") == tokens_of(model, "plain")


def test_dropout_is_noticed_while_it_is_active() -> None:
    model = lively_model(tiny_config(num_hidden_layers=3, dropout=0.1))
    assert find_modification(model) is None
    assert find_modification(model.train()) == "dropout is active, for the model is in training mode"
    assert find_modification(lively_model(tiny_config(num_hidden_layers=3)).train()) is None


def test_what_every_user_does_to_a_model_is_no_customization() -> None:
    for kernel in ("sdpa", "block-local", "flex", "reference"):
        model = lively_model(tiny_config(num_hidden_layers=3, tie_word_embeddings=False), kernel)
        assert find_modification(model) is None
    assert find_modification(move_to_huge_pages(model).bfloat16()) is None
    for block in model.blocks:
        block._compiled_call_impl = block._call_impl  # as block.compile() does, which takes seconds
    assert find_modification(model.requires_grad_(False)) is None
    assert find_modification(quantize(model)) is None
