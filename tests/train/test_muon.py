import copy

import pytest
import torch
from torch import nn

from gemmule.train import muon
from gemmule.train.muon import Muon, orthogonal

SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8), (16, 16), (24, 8)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("stacked", [1, 500, 2**24])
def test_stacks_move_as_torch_moves_one_by_one(monkeypatch: pytest.MonkeyPatch, stacked: int) -> None:
    monkeypatch.setattr(muon, "_STACKED", stacked)
    ours = matrices()
    theirs = copy.deepcopy(ours)
    start = [parameter.detach().clone() for parameter in ours]
    optimizer = Muon(ours, lr=0.02, weight_decay=0.1, momentum=0.95)
    library = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        library.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        difference, way = (one - other).norm(), (other - before).norm()
        assert difference < 0.02 * way, "bf16 rounds both, in another order"
        torch.testing.assert_close(
            optimizer.state[one]["momentum_buffer"], library.state[other]["momentum_buffer"], rtol=1e-5, atol=1e-7
        )


def test_a_matrix_without_gradient_stays() -> None:
    parameters = matrices()
    set_gradients(parameters, 0)
    parameters[0].grad = None
    before = [parameter.detach().clone() for parameter in parameters]
    Muon(parameters, lr=0.02, weight_decay=0.1, momentum=0.95).step()
    moved = [not torch.equal(now, then) for now, then in zip(parameters, before, strict=True)]
    assert moved == [False, True, True, True, True, True]


def test_orthogonal_keeps_directions_and_evens_lengths() -> None:
    wide = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    for given in (wide, wide.mT.contiguous()):
        u, _, v = torch.linalg.svd(given, full_matrices=False)
        found = u.mT @ orthogonal(given.bfloat16()).float() @ v.mT
        lengths = found.diagonal(dim1=1, dim2=2)
        assert lengths.min() > 0.6
        assert lengths.max() < 1.3
        assert (found - torch.diag_embed(lengths)).abs().max() < 0.05, "nothing turns"


def pulled(lengths: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        lengths = 3.4445 * lengths - 4.7750 * lengths**3 + 2.0315 * lengths**5
    return lengths


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(3, 24, 60), (3, 60, 24), (3, 40, 40)])
def test_orthogonal_does_to_singular_values_what_the_polynomial_does(
    shape: tuple[int, int, int], dtype: torch.dtype, bound: float
) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, lengths, v = torch.linalg.svd(given.double(), full_matrices=False)
    expected = u @ torch.diag_embed(pulled(lengths / lengths.norm(dim=1, keepdim=True))) @ v
    found = orthogonal(given.to(dtype))
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert (found.double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("others", [0.0, 1e-3])
def test_rounding_in_bf16_lets_nothing_grow(rank: int, others: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    lengths = torch.full((64,), others)
    lengths[:rank] = 1
    left, right = (torch.linalg.qr(torch.randn(8, size, 64, generator=generator))[0] for size in (64, 128))
    made = orthogonal((left @ torch.diag(lengths) @ right.mT).bfloat16())
    assert torch.linalg.matrix_norm(made.float(), ord=2).max() < 1.25


def test_nothing_to_learn_moves_nothing() -> None:
    nothing = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    assert torch.equal(orthogonal(nothing), nothing)
