"""The machine at hand, measured in about a second: its products at a model's own shapes, and its memory."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gemmule.plan.devices import Device
from gemmule.plan.fusion import is_attention, is_product
from gemmule.plan.trace import Operation

# Larger dimensions are measured at this size, which is large enough to be as fast as any.
_LARGEST = 1024
# Elements that no cache holds.
_COLD = 2**24
# Elements of a tensor that two threads share, small enough to take no time beside that of waking them.
_SMALL = 2**16


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
        self._known: dict[Any, float] = {}

    @property
    def assumptions(self) -> list[str]:
        """Return what the prices rest on, a sentence each."""
        rates = [rate for rate in self._known.values() if rate]
        middle = statistics.median(rates) if rates else 0.0
        return [
            f"measured here: products at the model's shapes, {middle / 1e9:,.0f} GFLOP/s in the middle of them; memory "
            f"{self._bandwidth / 1e9:.1f} GB/s; {self._call * 1e6:.0f} us to start anything; nothing else runs"
        ]

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the time of some operations, one after the other."""
        total = 0.0
        for operation in operations:
            if is_product(operation.name):
                total += operation.flops / self._rate(operation)
            elif operation.bytes:
                total += operation.bytes / self._bandwidth + self._call
        return total

    def _rate(self, operation: Operation) -> float:
        key = (operation.name, operation.call)
        if key not in self._known:
            self._known[key] = _attention_rate(operation) if is_attention(operation.name) else _product_rate(operation)
        return self._known[key]


def _time(work: Callable[[], Any]) -> float:
    """Return the lower quartile of a few times: what else the machine does makes work slower, never faster."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.01 and len(times) < 50):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.quantiles(times, n=4)[0]


def _product_rate(operation: Operation) -> float:
    """Time a matrix product, its dimensions capped; FLOP/s."""
    (left, dtype), (right, _) = operation.call[-2:]
    one, other = (torch.ones([min(size, _LARGEST) for size in shape], dtype=dtype) for shape in (left, right))
    flops: float = 2 * one.numel() * other.shape[-1]
    return flops / _time(lambda: one @ other)


def _attention_rate(operation: Operation) -> float:
    """Time attention there or back, on two rows; FLOP/s."""
    backward = operation.name.endswith("backward")
    tensors = operation.call[1:] if backward else operation.call
    (query, dtype), (key, _) = tensors[:2]
    masks = [torch.ones((1, 1, *shape[2:]), dtype=torch.bool).tril() for shape, _ in tensors[3:] if shape[1:2] == (1,)]
    rows = min(2, query[0])
    q, k, v = (torch.ones((rows, *shape[1:]), dtype=dtype, requires_grad=True) for shape in (query, key, key))
    options = {"enable_gqa": True, "is_causal": not masks, "attn_mask": masks[0] if masks else None}

    def there() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    flops: float = operation.flops * rows / query[0]
    if not backward:
        return flops / _time(there)
    out = there()
    return flops / _time(lambda: torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True))
