"""Devices by name with their published peaks and an assumed price, and the measured rates of the machine at hand.

Peaks are dense (no sparsity) with fp32 accumulation, from the data sheets named in docs/plan.md. `cpu` is the machine
at hand, whose kernels are timed in about a second.
"""

import difflib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gemmule.errors import DeviceError
from gemmule.plan.trace import Operand, Operation, is_attention, is_extern_kernel
from gemmule.processes import physical_memory

_TERA, _GIGA = 1e12, 1e9
# Larger matmuls are timed in part, with their longest sides halved.
_MAX_TIMED_FLOPS = 2**33
# Elements of a tensor that exceeds all caches.
_UNCACHED_ELEMENTS = 2**24
# Elements of a tensor that two threads share and whose time is that of waking them.
_SMALL_ELEMENTS = 2**16
# FLOP/s of the kernels that this process has timed.
_TIMED: dict[Any, float] = {}
# Operations with one exponential per element, which takes longer than its memory traffic.
_EXPONENTIALS = frozenset({"exp_", "gelu", "gelu_backward", "_softmax"})


class Device(NamedTuple):
    """A kind of device and its interconnect."""

    name: str
    title: str
    bf16: float | None  # FLOP/s; None without bf16
    fp32: float  # FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s to its memory
    # Bytes/s in one direction to another device in the same node, and in another node.
    intra_node: float
    inter_node: float
    per_node: int  # usual number of devices per node
    watts: float
    price: float  # US dollars per hour, assumed
    fused_attention: bool = True


def _gpu(
    title: str,
    bf16: float | None,
    fp32: float,
    gigabytes: float,
    bandwidth: float,
    intra_node: float,
    inter_node: float,
    watts: float,
    price: float,
    per_node: int = 8,
) -> tuple[str, Device]:
    name = title.split()[-1].lower()
    peak = None if bf16 is None else bf16 * _TERA
    numbers = (fp32 * _TERA, gigabytes * _GIGA, bandwidth * _GIGA, intra_node * _GIGA, inter_node * _GIGA)
    return name, Device(name, title, peak, *numbers, per_node, watts, price)


def _apple(title: str, fp32: float, gigabytes: float, bandwidth: float, watts: float) -> tuple[str, Device]:
    """Describe an Apple GPU, where torch trains in fp32; beyond the published M1, the peak is cores x clock."""
    name = title.split()[-1].lower()
    numbers = (fp32 * _TERA, gigabytes * _GIGA, bandwidth * _GIGA, 1 * _GIGA, 1 * _GIGA)
    return name, Device(name, title, None, *numbers, 1, watts, 0.0, fused_attention=False)


# TFLOP/s in bf16 and fp32, GB, GB/s of memory, within and between nodes, watts, dollars per hour.
DEVICES: dict[str, Device] = dict(
    [
        _gpu("NVIDIA B200", 2250, 75, 180, 7700, 900, 50, 1000, 6.00),
        _gpu("NVIDIA H200", 989, 67, 141, 4800, 450, 50, 700, 3.80),
        _gpu("NVIDIA H100", 989, 67, 80, 3350, 450, 50, 700, 3.00),
        _gpu("NVIDIA A100-80", 312, 19.5, 80, 2039, 300, 25, 400, 1.80),
        _gpu("NVIDIA A100-40", 312, 19.5, 40, 1555, 300, 25, 400, 1.30),
        _gpu("NVIDIA L40S", 362, 91.6, 48, 864, 32, 25, 350, 1.00),
        _gpu("NVIDIA RTX6000ADA", 364, 91.1, 48, 960, 32, 12.5, 300, 0.90, 4),
        _gpu("NVIDIA L4", 121, 30.3, 24, 300, 32, 12.5, 72, 0.70),
        _gpu("NVIDIA A10", 125, 31.2, 24, 600, 32, 12.5, 150, 0.75, 4),
        _gpu("NVIDIA T4", None, 8.1, 16, 320, 16, 6.25, 70, 0.35, 4),
        _gpu("NVIDIA V100", None, 15.7, 32, 900, 150, 12.5, 300, 0.80),
        _gpu("NVIDIA RTX 5090", 209.5, 104.8, 32, 1792, 64, 3, 575, 0.80, 4),
        _gpu("NVIDIA RTX 4090", 165.2, 82.6, 24, 1008, 32, 3, 450, 0.50, 4),
        _gpu("NVIDIA RTX 3090", 71, 35.6, 24, 936, 32, 3, 350, 0.25, 4),
        _gpu("NVIDIA RTX 3060", 25.5, 12.7, 12, 360, 16, 3, 170, 0.10, 2),
        _gpu("AMD MI300X", 1307, 163.4, 192, 5300, 448, 50, 750, 2.50),
        _apple("Apple M1", 2.6, 16, 68, 20),
        _apple("Apple M2", 3.6, 24, 100, 20),
        _apple("Apple M3", 3.5, 24, 100, 20),
        _apple("Apple M3-MAX", 14.2, 128, 400, 60),
        _apple("Apple M4", 4.3, 32, 120, 22),
        _apple("Apple M4-MAX", 17.0, 128, 546, 65),
    ]
)
# Short names of common devices.
_ALIASES = {"a100": "a100-80", "rtx4090": "4090", "rtx3090": "3090", "rtx5090": "5090", "rtx3060": "3060"}


def find_device(name: str) -> Device:
    """Return a device by name; DeviceError suggests the most similar name."""
    wanted = name.lower().replace(" ", "").replace("_", "-")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted in DEVICES:
        return DEVICES[wanted]
    known = ["cpu", *DEVICES, *_ALIASES]
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DeviceError(f"--device {name}: unknown device; {hint}known are cpu, {', '.join(DEVICES)}")


def this_machine() -> Device:
    """Return the machine at hand as a device without published rates; `MeasuredCostModel` measures them."""
    threads = torch.get_num_threads()
    title = f"this machine ({platform.machine()}, {threads} {'thread' if threads == 1 else 'threads'})"
    return Device("cpu", title, 1.0, 1.0, float(physical_memory() or 0), 1.0, 1.0, 1.0, 1, 0.0, 0.0)


class MeasuredCostModel:
    """Cost model of the machine at hand: matmuls timed at the model's own shapes, other operations by their traffic."""

    def __init__(self, activation_bytes: int) -> None:
        """Measure the memory bandwidth with tensors of the size of an activation, and more of them than caches hold."""
        elements = max(2**14, min(2**23, activation_bytes // 4))
        self._bandwidth, self._call, self._exponential = _elementwise_speed(elements, torch.get_num_threads())
        self._used_rates: dict[Any, float] = {}

    @cached_property
    def _uncached(self) -> Tensor:
        return torch.ones(_UNCACHED_ELEMENTS, dtype=torch.float32)

    @property
    def assumptions(self) -> list[str]:
        """Return the assumptions of the estimate, one sentence each."""
        rates = [rate for rate in self._used_rates.values() if rate]
        median = statistics.median(rates) if rates else 0.0
        return [
            f"measured on this machine: matmuls of the model's shapes, median {median / 1e9:,.0f} GFLOP/s; memory "
            f"{self._bandwidth / 1e9:.1f} GB/s; {self._exponential * 1e9:.2f} ns per exponential; "
            f"{self._call * 1e6:.0f} us per operation; no other load"
        ]

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the time of operations in sequence."""
        total = 0.0
        for operation in operations:
            if is_extern_kernel(operation.name):
                total += operation.flops / self._rate(operation)
                continue
            if operation.bytes:
                total += operation.bytes / self._bandwidth + self._call
            if operation.name in _EXPONENTIALS:
                total += prod(operation.call[0].shape) * self._exponential
        return total

    def _flush_caches(self) -> None:
        """Evict the operands from the CPU caches."""
        self._uncached.mul_(1.0)

    def _rate(self, operation: Operation) -> float:
        key = (operation.name, operation.call, torch.get_num_threads())
        if key not in _TIMED:
            rate = _attention_rate if is_attention(operation.name) else _matmul_rate
            _TIMED[key] = rate(operation, self._flush_caches)
        return self._used_rates.setdefault(key, _TIMED[key])


@lru_cache(maxsize=32)
def _elementwise_speed(elements: int, _threads: int) -> tuple[float, float, float]:
    """Return bytes per second, with operands of so many elements, seconds per call, and seconds per exponential."""
    ones = [torch.ones(elements, dtype=torch.float32) for _ in range(max(4, _UNCACHED_ELEMENTS // elements))]
    twos = [torch.empty_like(one) for one in ones]
    seconds = _time(lambda: [torch.mul(one, 2.0, out=two) for one, two in zip(ones, twos, strict=True)])
    small = torch.ones(_SMALL_ELEMENTS, dtype=torch.float32)
    call = _time(lambda: small * 2.0)
    cached = torch.ones(4 * _SMALL_ELEMENTS, dtype=torch.float32)
    return 8 * elements * len(ones) / seconds, call, _time(cached.exp) / cached.numel()


def _time(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Return the lower quartile of a few timings: other load makes work slower, never faster."""
    work()
    times: list[float] = []
    start = time.perf_counter()  # flushing the caches can take longer than the work
    while len(times) < 5 or (time.perf_counter() - start < 0.02 and len(times) < 50):
        before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.quantiles(times, n=4)[0]


def _matmul_rate(operation: Operation, flush: Callable[[], Any]) -> float:
    """Time a matmul, or a part of a large one, with operands of the same memory layout, uncached; FLOP/s."""
    left, right = operation.call[-2:]
    *stack, rows, inner = left.shape
    shape = [*stack, rows, inner, right.shape[-1]]
    while 2 * prod(shape) > _MAX_TIMED_FLOPS:
        shape[shape.index(max(shape))] //= 2
    *stack, rows, inner, columns = shape
    one, other = _with_layout(left, [*stack, rows, inner]), _with_layout(right, [*stack, inner, columns])
    return 2 * prod(shape) / _time(lambda: one @ other, flush)


def _with_layout(operand: Operand, shape: Sequence[int]) -> Tensor:
    """Return a tensor of another shape with the memory layout of an operand."""
    if operand.transposed:
        return torch.ones([*shape[:-2], shape[-1], shape[-2]], dtype=operand.dtype).mT
    return torch.ones(shape, dtype=operand.dtype)


def _attention_rate(operation: Operation, flush: Callable[[], Any]) -> float:
    """Time the forward or backward pass of attention on two rows; FLOP/s."""
    backward = operation.name.endswith("backward")
    tensors = operation.call[1:] if backward else operation.call
    (query, dtype, _), (key, *_) = tensors[:2]
    masks = [torch.ones((1, 1, *shape[2:]), dtype=torch.bool).tril() for shape, *_ in tensors[3:] if shape[1:2] == (1,)]
    rows = min(2, query[0])
    q, k, v = (torch.ones((rows, *shape[1:]), dtype=dtype, requires_grad=True) for shape in (query, key, key))
    options = {"enable_gqa": True, "is_causal": not masks, "attn_mask": masks[0] if masks else None}

    def forward() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    flops: float = operation.flops * rows / query[0]
    if not backward:
        return flops / _time(forward, flush)
    out = forward()
    return flops / _time(lambda: torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True), flush)
