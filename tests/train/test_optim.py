from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gemmule.errors import RecipeError
from gemmule.model.gemma3 import Gemma3
from gemmule.run_folder import read_json_lines
from gemmule.settings import check_recipe
from gemmule.train.optim import OPTIMIZERS, Arithmetic, Named, Optimizers, OptimizerSettings
from runs import gemmule, overrides
from tiny import lively_model, optimizer_step, tiny_config

every_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def settings_of(name: str, **changes: float) -> OptimizerSettings:
    rates = {"learning_rate": 0.01, "adamw_learning_rate": 0.003}
    return OptimizerSettings.model_validate({"name": name} | rates | changes)


def untied_model() -> Gemma3:
    return lively_model(tiny_config(tie_word_embeddings=False))


def set_gradients(model: nn.Module, size: float, seed: int = 0) -> None:
    """Give each parameter a gradient of standard deviation `size`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_matrix_inside_a_block(name: str) -> bool:
    return name.startswith("blocks.") and "norm" not in name


def sgd(parameters: Named, settings: OptimizerSettings, _precision: Arithmetic) -> list[Optimizer]:
    """Plain gradient descent."""
    return [torch.optim.SGD([parameter for _, parameter in parameters], lr=settings.learning_rate)]


def test_every_optimizer_can_be_chosen_and_no_other() -> None:
    for name in OPTIMIZERS:
        assert check_recipe({"name": name}, OptimizerSettings, "x").name == name
    with pytest.raises(RecipeError, match='name = "sgd": no such optimizer; there are adamw, muon'):
        check_recipe({"name": "sgd"}, OptimizerSettings, "x")


@pytest.mark.slow
def test_one_line_in_optimizers_adds_an_optimizer_that_trains(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", sgd)
    changes = overrides("train.steps=6", "optimizer.name=sgd", "optimizer.learning_rate=0.5")
    assert gemmule("train", tiny_recipe, *changes, "--out", tmp_path / "run").code == 0
    losses = [line["loss"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1


def test_constants_are_the_seed_documents() -> None:
    seed = OptimizerSettings()
    assert (seed.name, seed.learning_rate, seed.beta_1, seed.beta_2, seed.weight_decay) == (
        "adamw",
        2.5e-4,
        0.9,
        0.95,
        0.1,
    )


@every_optimizer
@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_has_exactly_one_owner(name: str, tied: bool) -> None:
    model = lively_model(tiny_config(tie_word_embeddings=tied))
    optimizers = OPTIMIZERS[name](list(model.named_parameters()), settings_of(name), "fp32")
    owned = [parameter for o in optimizers for group in o.param_groups for parameter in group["params"]]
    assert Counter(map(id, owned)) == Counter(map(id, model.parameters()))


@every_optimizer
def test_every_parameter_moves(name: str) -> None:
    model = untied_model()
    before = weights_of(model)
    set_gradients(model, 1.0)
    optimizer_step(Optimizers(model, settings_of(name)), 1.0)
    assert [key for key, value in weights_of(model).items() if torch.equal(value, before[key])] == []


@every_optimizer
def test_decay_draws_from_the_blocks_matrices_alone(name: str) -> None:
    model = untied_model()
    before = weights_of(model)
    set_gradients(model, 0.0)
    optimizer_step(Optimizers(model, settings_of(name, weight_decay=0.5)), 0.8)
    for key, value in weights_of(model).items():
        share = 1 - 0.01 * 0.8 * 0.5 if is_matrix_inside_a_block(key) else 1.0
        torch.testing.assert_close(value, before[key] * share, rtol=1e-6, atol=0)


def test_muon_moves_matrices_in_directions_of_equal_length_and_adamw_the_rest() -> None:
    model = untied_model()
    before = weights_of(model)
    set_gradients(model, 1.0)
    optimizer_step(Optimizers(model, settings_of("muon", weight_decay=0.0, clip=1e9)), 0.5)
    for key, value in weights_of(model).items():
        moved = value - before[key]
        if is_matrix_inside_a_block(key):
            lengths = torch.linalg.svdvals(moved) / (0.01 * 0.5 * 0.2 * max(moved.shape) ** 0.5)
            # Five Newton-Schulz iterations bring the singular values near 1, not to it.
            assert lengths.min() > 0.5, key
            assert lengths.max() < 1.3, key
        else:  # AdamW's first step is the rate times the sign of the gradient.
            torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.003 * 0.5), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 200), (200, 8), (60, 60)])
def test_muon_moves_a_matrix_of_any_shape_as_far_as_adamw_would(shape: tuple[int, int]) -> None:
    matrix = nn.Parameter(torch.zeros(shape))
    (optimizer,) = OPTIMIZERS["muon"](
        [("blocks.0.weight", matrix), ("norm.weight", nn.Parameter(torch.zeros(1)))], settings_of("muon"), "fp32"
    )[:1]
    matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    # AdamW's updates are about 0.2 of the rate, root mean square (arXiv 2502.16982).
    assert matrix.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


@every_optimizer
def test_rate_follows_the_factor(name: str) -> None:
    optimizers = Optimizers(model := untied_model(), settings_of(name))
    for factor in (0.5, 1.0, 0.25):
        set_gradients(model, 1.0)
        optimizer_step(optimizers, factor)
        assert optimizers.learning_rate == pytest.approx(0.01 * factor)


def test_long_gradients_are_shortened_to_the_clip_and_short_ones_kept() -> None:
    for size, kept in ((1.0, False), (1e-4, True)):
        model = untied_model()
        set_gradients(model, size)
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        optimizers = Optimizers(model, settings_of("adamw", clip=0.5))
        assert optimizer_step(optimizers, 1.0) == pytest.approx(norm.item(), rel=1e-5), "the norm before clipping"
        assert (norm < 0.5) == kept
        for key, gradient in gradients.items():
            used = optimizers.state_dict()[f"{key}/exp_avg"] / (1 - 0.9)
            torch.testing.assert_close(used, gradient if kept else gradient * 0.5 / norm, rtol=1e-4, atol=1e-9)


@every_optimizer
def test_gradients_are_cleared(name: str) -> None:
    optimizers = Optimizers(model := untied_model(), settings_of(name))
    set_gradients(model, 1.0)
    optimizer_step(optimizers, 1.0)
    assert all(parameter.grad is None for parameter in model.parameters())


@every_optimizer
def test_gradients_that_are_discarded_move_nothing(name: str) -> None:
    model = untied_model()
    optimizers = Optimizers(model, settings_of(name))
    set_gradients(model, 1.0)
    optimizer_step(optimizers, 1.0)
    before, remembered = weights_of(model), {key: value.clone() for key, value in optimizers.state_dict().items()}
    set_gradients(model, 1.0)
    optimizers.zero_grad()
    assert all(torch.equal(value, before[key]) for key, value in weights_of(model).items())
    assert all(torch.equal(value, remembered[key]) for key, value in optimizers.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@every_optimizer
def test_what_is_remembered_goes_on_bit_for_bit(name: str) -> None:
    whole, first, second = (untied_model() for _ in range(3))
    straight, stopped, resumed = (Optimizers(model, settings_of(name)) for model in (whole, first, second))
    for seed in range(6):
        if seed == 3:
            second.load_state_dict(first.state_dict())
            resumed.allocate_state(stopped.state_dict())
            for key, value in resumed.state_dict().items():
                value.copy_(stopped.state_dict()[key])
        model, optimizers = (first, stopped) if seed < 3 else (second, resumed)
        for each, moving in ((whole, straight), (model, optimizers)):
            set_gradients(each, 1.0, seed)
            optimizer_step(moving, 1 / (1 + seed))
    expected = weights_of(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights_of(second).items())
    assert not all(torch.equal(value, expected[key]) for key, value in weights_of(first).items())
