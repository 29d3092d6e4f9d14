"""Cost model: the time of kernels, of a micro-batch, of an optimizer step and of collectives.

A kernel takes the longer of its arithmetic and its memory traffic (a roofline). The share of the published peak that a
device reaches is assumed below; on the machine at hand, kernels are timed instead (`devices.py`, `MeasuredCostModel`).

Collectives are rings: of P bytes on n devices, an all-gather or a reduce-scatter moves (n - 1)/n P through each device,
an all-reduce twice that (Patarasuk and Yuan, 2009). A collective takes the transfer over the slowest link of its ring,
and one latency per level of a tree of n devices.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from gemmule.model.config import Kind
from gemmule.plan.devices import Device
from gemmule.plan.memory import BF16, FP32, OptimizerStep, ParameterCount, Sharding
from gemmule.plan.trace import Operation, Trace, is_attention, is_extern_kernel

# Efficiencies of well-made kernels on large tensors, as shares of the published peak: by experience, not measured.
MATMUL_EFFICIENCY, ATTENTION_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.65, 0.35, 0.80
# Seconds of Python and torch per kernel launch, backward included.
LAUNCH_SECONDS = 6e-6
# Efficiency of a link; seconds of latency per hop within a node and between nodes.
LINK_EFFICIENCY, INTRA_NODE_LATENCY, INTER_NODE_LATENCY = 0.75, 5e-6, 15e-6


class CostModel(Protocol):
    """Estimates the time of operations."""

    @property
    def assumptions(self) -> list[str]:
        """Return the assumptions of the estimate, one sentence each."""

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the time of operations in sequence."""


class Roofline:
    """Cost model from the published peaks of a device."""

    def __init__(self, device: Device, precision: Literal["bf16", "fp32"]) -> None:
        self._peak = device.bf16 if precision == "bf16" and device.bf16 else device.fp32
        self._bandwidth = BANDWIDTH_EFFICIENCY * device.bandwidth
        self._device = device

    @property
    def assumptions(self) -> list[str]:
        """Return the assumptions of the estimate, one sentence each."""
        return [
            f"{self._device.title}: peak {self._peak / 1e12:g} TFLOP/s, {self._device.bandwidth / 1e9:,.0f} GB/s",
            f"matmuls reach {MATMUL_EFFICIENCY:.0%} of peak, attention {ATTENTION_EFFICIENCY:.0%}, memory "
            f"{BANDWIDTH_EFFICIENCY:.0%}; a kernel launch takes {LAUNCH_SECONDS * 1e6:.0f} us",
        ]

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the time of operations in sequence, bound by kernel launches where kernels are shorter."""
        busy = launches = 0.0
        for operation in operations:
            if not operation.bytes:
                continue  # fused into another
            efficiency = ATTENTION_EFFICIENCY if is_attention(operation.name) else MATMUL_EFFICIENCY
            arithmetic = operation.flops / (self._peak * efficiency) if is_extern_kernel(operation.name) else 0.0
            busy += max(arithmetic, operation.bytes / self._bandwidth)
            launches += LAUNCH_SECONDS
        return max(busy, launches)


class Flops(NamedTuple):
    """FLOPs of a micro-batch."""

    forward: float
    backward: float  # recomputed activations included

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def micro_batch_flops(traced: Trace, kinds: Sequence[Kind]) -> Flops:
    """Count the FLOPs of the matmuls of a micro-batch; attention counts the full T x S scores, as computed."""
    forward = backward = 0.0
    for segment, _ in traced.step(kinds):
        repeats = traced.loss_repeats if segment.part == "loss" else 1.0
        work = repeats * sum(operation.flops for operation in traced.operations[segment.start : segment.stop])
        forward, backward = (forward + work, backward) if segment.forward else (forward, backward + work)
    return Flops(forward, backward)


def micro_batch_seconds(traced: Trace, kinds: Sequence[Kind], cost_model: CostModel) -> tuple[float, float]:
    """Return the seconds of the forward and of the backward pass of a micro-batch."""
    of_part = {
        (segment.part, segment.forward): cost_model.seconds(traced.operations[segment.start : segment.stop])
        * (traced.loss_repeats if segment.part == "loss" else 1.0)
        for segment in traced.segments
    }
    forward = backward = 0.0
    for segment, _ in traced.step(kinds):
        seconds = of_part[segment.part, segment.forward]
        forward, backward = (forward + seconds, backward) if segment.forward else (forward, backward + seconds)
    return forward, backward


def optimizer_seconds(step: OptimizerStep, shards: int, cost_model: CostModel) -> float:
    """Return the seconds of an optimizer step that is divided among the shards of the weights."""
    return sum(times * cost_model.seconds([operation]) for operation, times in step.operations) / shards


class Collective(NamedTuple):
    """The collectives of one kind in an optimizer step."""

    name: str
    bytes: float  # sent per device
    calls: int
    devices: int
    inter_node: bool


def ring(name: str, payload: float, devices: int, calls: int, inter_node: bool) -> Collective:
    """Return a ring collective: each device sends (n - 1)/n of `payload` bytes, twice that in an all-reduce."""
    passes = 2 if name.startswith("all-reduce") else 1
    return Collective(name, passes * (devices - 1) / devices * payload, calls, devices, inter_node)


def step_collectives(
    count: ParameterCount,
    layers: int,
    matrices: int,
    sharding: Sharding,
    micro_batches: int,
    precision: Literal["bf16", "fp32"],
) -> list[Collective]:
    """List the collectives of an optimizer step; `matrices` is the number of parameters that Muon updates."""
    n, shards = sharding.gpus, sharding.shards
    if n == 1:
        return []
    inter_node = n > sharding.per_node
    if sharding.strategy == "ddp":
        # In buckets of 25 MB, overlapped with the backward pass.
        buckets = math.ceil(FP32 * count.total / 25e6)
        return [ring("all-reduce of gradients", FP32 * count.total, n, buckets, inter_node)]
    width = BF16 if precision == "bf16" else FP32
    vocabulary = count.embedding + count.head
    # Per micro-batch: blocks in the forward and the backward pass, the embedding once. Gradients: after the last one.
    gathered = width * (2 * count.body + vocabulary) * micro_batches
    shards_span_nodes = inter_node and sharding.strategy == "fsdp"
    found = [
        ring("all-gather of weights", gathered, shards, (2 * layers + 1) * micro_batches, shards_span_nodes),
        ring("reduce-scatter of gradients", FP32 * count.total, shards, layers + 1, shards_span_nodes),
    ]
    replicas = n // shards
    if replicas > 1:
        found.append(ring("all-reduce of gradient shards", FP32 * count.total / shards, replicas, layers + 1, True))
    if matrices:
        # Row shards are redistributed to whole matrices and back.
        found.append(ring("all-to-all for Muon", 2 * FP32 * matrices / shards, shards, 2 * 7, shards_span_nodes))
    return found


def collective_seconds(collective: Collective, device: Device) -> float:
    """Return the time of a collective."""
    link = LINK_EFFICIENCY * (device.inter_node if collective.inter_node else device.intra_node)
    latency = INTER_NODE_LATENCY if collective.inter_node else INTRA_NODE_LATENCY
    return collective.bytes / link + collective.calls * latency * math.ceil(math.log2(max(2, collective.devices)))


def exposed_seconds(found: list[Collective], device: Device, overlap: float, layers: int) -> float:
    """Return the exposed communication time: beyond `overlap` seconds of compute, and at least one block's share.

    The all-to-all for Muon does not overlap with compute.
    """
    exposed = sum(collective_seconds(one, device) for one in found if one.name.startswith("all-to-all"))
    overlapped = sum(collective_seconds(one, device) for one in found) - exposed
    return exposed + max(overlapped - overlap, overlapped / layers)
