"""How long an operation takes on a device: a roofline with stated efficiencies.

An operation takes the longer of its arithmetic and its traffic to memory. What a device reaches of its maker's peak is
assumed below; `probe.py` measures instead, where the device is the machine at hand.
"""

from collections.abc import Iterable
from typing import Literal, Protocol

from gemmule.plan.devices import Device
from gemmule.plan.fusion import is_attention, is_product
from gemmule.plan.trace import Operation

# Shares of the published peak that well-made kernels reach on large tensors; by experience, not by measurement here.
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.65, 0.35, 0.80
# Seconds for which Python and torch are busy to start one kernel, there and back.
LAUNCH = 6e-6


class Prices(Protocol):
    """Says how long operations take."""

    @property
    def assumptions(self) -> list[str]:
        """Return what the prices rest on, a sentence each."""

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the time of some operations, one after the other."""


class Roofline:
    """Prices from a device's published peaks."""

    def __init__(self, device: Device, precision: Literal["bf16", "fp32"]) -> None:
        self._peak = device.bf16 if precision == "bf16" and device.bf16 else device.fp32
        self._bandwidth = BANDWIDTH_SHARE * device.bandwidth
        self._device = device

    @property
    def assumptions(self) -> list[str]:
        """Return what the prices rest on, a sentence each."""
        return [
            f"{self._device.title}: {self._peak / 1e12:g} TFLOP/s at most, {self._device.bandwidth / 1e9:,.0f} GB/s",
            f"matrix products reach {PRODUCT_SHARE:.0%} of that, attention {ATTENTION_SHARE:.0%}, memory "
            f"{BANDWIDTH_SHARE:.0%}; a kernel takes {LAUNCH * 1e6:.0f} us to start",
        ]

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the time of some operations: kernels wait for the host where they are shorter than their start."""
        busy = launches = 0.0
        for operation in operations:
            if not operation.bytes:
                continue  # fused into another
            share = ATTENTION_SHARE if is_attention(operation.name) else PRODUCT_SHARE
            arithmetic = operation.flops / (self._peak * share) if is_product(operation.name) else 0.0
            busy += max(arithmetic, operation.bytes / self._bandwidth)
            launches += LAUNCH
        return max(busy, launches)
