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
        found = u.mT @ orthogonal(given).float() @ v.mT
        lengths = found.diagonal(dim1=1, dim2=2)
        assert lengths.min() > 0.6
        assert lengths.max() < 1.3
        assert (found - torch.diag_embed(lengths)).abs().max() < 0.05, "nothing turns"


def test_nothing_to_learn_moves_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4, dtype=torch.bfloat16))
