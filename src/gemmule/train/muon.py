"""Muon: momentum whose matrices are made orthogonal before they are used (Jordan et al. 2024).

Does what `torch.optim.Muon` does, and all matrices of one shape at a time: a small model is made of many small
matrices, and two cores take three times as long over them one by one.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

# Of a polynomial a x + b x^3 + c x^5 that pulls singular values from (0, 1] to about 1 in five applications; Jordan's.
_A, _B, _C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
# Elements that are stacked at once: larger matrices gain nothing from company, and copies of all would take memory.
_STACKED = 2**24


def orthogonal(matrices: Tensor) -> Tensor:
    """Return U V^T, roughly, for each U S V^T of matrices (number, rows, columns), by Newton-Schulz iteration."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, *((polynomial, x) if wide else (x, polynomial)), beta=_A)
    return x


class Muon(Optimizer):
    """Move matrices along their Nesterov momentum with all singular values set to about 1.

    The step is scaled to the size that AdamW's would have (arXiv 2502.16982), so rates and decay carry over.
    `make` is `orthogonal`, or does the same for stacks of which this process has a share. It computes in `dtype`: bf16
    is enough for learning, but makes of rounding in the gradients something larger.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.bfloat16,
        make: Callable[[Tensor], Tensor] = orthogonal,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype, self._make = dtype, make

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient; there is no use for a closure."""
        assert closure is None
        for group in self.param_groups:
            for matrices in stacks(p for p in group["params"] if p.grad is not None):
                self._move(matrices, group["lr"], group["weight_decay"], group["momentum"])

    def _move(self, matrices: list[Tensor], rate: float, decay: float, momentum: float) -> None:
        gradients: list[Tensor] = [matrix.grad for matrix in matrices]  # type: ignore[misc]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        steps = self._make(torch.stack([direction.to(self._dtype) for direction in ahead]))
        size = 0.2 * max(steps.shape[1:]) ** 0.5
        torch._foreach_mul_(matrices, 1 - rate * decay)
        torch._foreach_add_(matrices, list(steps), alpha=-rate * size)


def stacks(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the matrices in lists of one shape."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        shapes.setdefault(matrix.shape, []).append(matrix)
    for shape, alike in shapes.items():
        many = max(1, _STACKED // shape.numel())
        yield from (alike[first : first + many] for first in range(0, len(alike), many))
