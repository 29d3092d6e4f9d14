from typing import Literal, get_args

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from gemmule.runtime import Runtime
from gemmule.train.loss import summed_loss
from gemmule.train.parallel import Parallel, ParallelSettings, gather_model, on_whole_matrices, parallelize, unwrapped
from tiny import lively_model, some_tokens, tiny_config

CPU = torch.device("cpu")
HOW = get_args(ParallelSettings.model_fields["activation_checkpointing"].annotation)


def placed(how: str, compile_blocks: bool = False, dropout: float = 0.0) -> Parallel:
    with torch.device("meta"):
        model = Gemma3(tiny_config(dropout=dropout))
    settings = ParallelSettings.model_validate({"activation_checkpointing": how})
    return parallelize(
        model, settings, compile_blocks, Runtime(CPU), lambda model, copy: init_weights(model, 0, copy=copy)
    )


def learn(parallel: Parallel) -> tuple[float, dict[str, Tensor], int]:
    """Return the loss, the gradients, and the bytes that the backward pass keeps beside the weights."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in parallel.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, targets = some_tokens(tiny_config()), some_tokens(tiny_config(), seed=5)
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = parallel.forward(tokens, output_head=summed_loss(targets))
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in parallel.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("how", HOW)
def test_recomputing_changes_no_gradient(how: str, dropout: float) -> None:
    loss, gradients, _ = learn(placed("none", dropout=dropout))
    again, others, _ = learn(placed(how, dropout=dropout))
    assert again == loss
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_recomputing_everything_keeps_a_fraction() -> None:
    everything, inputs = (learn(placed(how))[2] for how in ("none", "full"))
    assert inputs < everything / 10


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns itself
@pytest.mark.parametrize("how", HOW)
def test_compiled_blocks_that_recompute_have_the_same_gradients(how: str) -> None:
    loss, gradients, _ = learn(placed("none"))
    counters.clear()
    again, others, kept = learn(placed(how, compile_blocks=True))
    assert counters["stats"]["unique_graphs"] > 0  # in silence, the compiler would have stood aside
    assert not counters["graph_break"]
    if how == "full":
        assert kept < learn(placed("none", compile_blocks=True))[2] / 3
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()  # what is small beside it is a sum of what is not
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_one_process_has_its_model_whole() -> None:
    model = lively_model(tiny_config())
    parallel = unwrapped(model)
    assert gather_model(parallel, "sdpa") is model
    stack = torch.randn(3, 4, 5)
    assert torch.equal(on_whole_matrices(lambda matrices: 2 * matrices)(stack), 2 * stack)


@pytest.mark.parametrize("how", HOW)
def test_first_weights_do_not_depend_on_how_they_are_spread(how: Literal["none"]) -> None:
    model = Gemma3(tiny_config())
    init_weights(model, 0)
    spread = dict(placed(how).model.named_parameters())
    assert all(torch.equal(spread[name], parameter) for name, parameter in model.named_parameters())
