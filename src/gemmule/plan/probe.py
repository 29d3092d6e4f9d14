"""The machine at hand, measured in about a second: its products at a model's own shapes, and its memory."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gemmule.plan.devices import Device
from gemmule.plan.fusion import is_attention, is_product
from gemmule.plan.trace import Operand, Operation

# FLOPs of a product that is timed: of a larger one a part, in which its longest sides are halved.
_ENOUGH = 2**33
# Elements that no cache holds.
_COLD = 2**24
# Elements of a tensor that two threads share, small enough to take no time beside that of waking them.
_SMALL = 2**16
# Operations that compute an exponential for each element, which takes longer than to read and write it.
_CURVES = frozenset({"exp_", "gelu", "gelu_backward", "_softmax"})


def this_machine() -> Device:
    """Describe the machine at hand as a device; its rates are measured by `Probe`."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    title = f"this machine ({platform.machine()}, {torch.get_num_threads()} threads)"
    return Device("cpu", title, 1.0, 1.0, float(pages), 1.0, 1.0, 1.0, 1, 0.0, 0.0)


class Probe:
    """Prices of the machine at hand: each product is timed once at its own shapes, the rest by its traffic."""

    def __init__(self, bytes_of_a_pass: int) -> None:
        """Measure memory with tensors as large as one that goes through the model, and too many for the caches."""
        elements = max(2**14, min(2**23, bytes_of_a_pass // 4))
        ones = [torch.ones(elements) for _ in range(max(4, _COLD // elements))]
        twos = [torch.empty_like(one) for one in ones]
        seconds = _time(lambda: [torch.mul(one, 2.0, out=two) for one, two in zip(ones, twos, strict=True)])
        self._bandwidth = 8 * elements * len(ones) / seconds
        small = torch.ones(_SMALL)
        self._call = _time(lambda: small * 2.0)
        cached = torch.ones(4 * _SMALL)
        self._exponential = _time(cached.exp) / cached.numel()
        self._cold = torch.ones(_COLD)
        self._known: dict[Any, float] = {}

    @property
    def assumptions(self) -> list[str]:
        """Return what the prices rest on, a sentence each."""
        rates = [rate for rate in self._known.values() if rate]
        middle = statistics.median(rates) if rates else 0.0
        return [
            f"measured here: products at the model's shapes, {middle / 1e9:,.0f} GFLOP/s in the middle of them; memory "
            f"{self._bandwidth / 1e9:.1f} GB/s; {self._exponential * 1e9:.2f} ns an exponential; "
            f"{self._call * 1e6:.0f} us to start anything; nothing else runs"
        ]

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the time of some operations, one after the other."""
        total = 0.0
        for operation in operations:
            if is_product(operation.name):
                total += operation.flops / self._rate(operation)
                continue
            if operation.bytes:
                total += operation.bytes / self._bandwidth + self._call
            if operation.name in _CURVES:
                total += prod(operation.call[0].shape) * self._exponential
        return total

    def _forget(self) -> None:
        """Fill the caches with something else."""
        self._cold.mul_(1.0)

    def _rate(self, operation: Operation) -> float:
        key = (operation.name, operation.call)
        if key not in self._known:
            rate = _attention_rate if is_attention(operation.name) else _product_rate
            self._known[key] = rate(operation, self._forget)
        return self._known[key]


def _time(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Return the lower quartile of a few times: what else the machine does makes work slower, never faster."""
    work()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.02 and len(times) < 50):
        before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.quantiles(times, n=4)[0]


def _product_rate(operation: Operation, forget: Callable[[], Any]) -> float:
    """Time a matrix product, or a part of it, with operands that lie as its own do and in no cache; FLOP/s."""
    left, right = operation.call[-2:]
    *stack, rows, inner = left.shape
    sides = [*stack, rows, inner, right.shape[-1]]
    while 2 * prod(sides) > _ENOUGH:
        sides[sides.index(max(sides))] //= 2
    *stack, rows, inner, columns = sides
    one, other = _like(left, [*stack, rows, inner]), _like(right, [*stack, inner, columns])
    return 2 * prod(sides) / _time(lambda: one @ other, forget)


def _like(operand: Operand, shape: Sequence[int]) -> Tensor:
    """Return a tensor of another shape that lies in memory as an operand does."""
    if operand.transposed:
        return torch.ones([*shape[:-2], shape[-1], shape[-2]], dtype=operand.dtype).mT
    return torch.ones(shape, dtype=operand.dtype)


def _attention_rate(operation: Operation, forget: Callable[[], Any]) -> float:
    """Time attention there or back, on two rows; FLOP/s."""
    backward = operation.name.endswith("backward")
    tensors = operation.call[1:] if backward else operation.call
    (query, dtype, _), (key, *_) = tensors[:2]
    masks = [torch.ones((1, 1, *shape[2:]), dtype=torch.bool).tril() for shape, *_ in tensors[3:] if shape[1:2] == (1,)]
    rows = min(2, query[0])
    q, k, v = (torch.ones((rows, *shape[1:]), dtype=dtype, requires_grad=True) for shape in (query, key, key))
    options = {"enable_gqa": True, "is_causal": not masks, "attn_mask": masks[0] if masks else None}

    def there() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    flops: float = operation.flops * rows / query[0]
    if not backward:
        return flops / _time(there, forget)
    out = there()
    return flops / _time(lambda: torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True), forget)
