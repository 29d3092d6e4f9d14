"""What devices send each other in a step, and how long it takes: ring collectives, from a stated model.

Of P bytes on n devices, an all-gather or a reduce-scatter moves (n - 1)/n P through each device, an all-reduce twice
that (Patarasuk and Yuan, 2009). A collective takes that over the slowest link of its ring, and a latency for each level
of the tree by which n devices agree.
"""

import math
from typing import Literal, NamedTuple

from gemmule.plan.devices import Device
from gemmule.plan.memory import BF16, FP32, Count, Sharing

# Of the published bandwidth; seconds for one hop inside a machine and between two.
LINK_SHARE, HOP_INSIDE, HOP_BETWEEN = 0.75, 5e-6, 15e-6


class Collective(NamedTuple):
    """One kind of exchange: how many bytes each device sends in a step, in how many calls, among how many devices."""

    name: str
    bytes: float
    calls: int
    devices: int
    between_machines: bool


def ring(name: str, payload: float, devices: int, calls: int, between: bool) -> Collective:
    """Return what `payload` bytes cost each device: (n - 1)/n of them, an all-reduce twice as many."""
    passes = 2 if name.startswith("all-reduce") else 1
    return Collective(name, passes * (devices - 1) / devices * payload, calls, devices, between)


def exchanges(
    count: Count,
    layers: int,
    matrices: int,
    sharing: Sharing,
    micro_batches: int,
    precision: Literal["bf16", "fp32"],
) -> list[Collective]:
    """List the exchanges of one optimizer step; `matrices` parameters are moved by Muon."""
    n, shards = sharing.gpus, sharing.shards
    if n == 1:
        return []
    far = n > sharing.per_machine
    if sharing.strategy == "ddp":
        # In buckets of 25 MB, while the way back goes on.
        buckets = math.ceil(FP32 * count.total / 25e6)
        return [ring("all-reduce of gradients", FP32 * count.total, n, buckets, far)]
    width = BF16 if precision == "bf16" else FP32
    vocabulary = count.embedding + count.head
    # Blocks are gathered there and back in every micro-batch, the embedding once; gradients travel after the last.
    gathered = width * (2 * count.body + vocabulary) * micro_batches
    among_shards = far and sharing.strategy == "fsdp"
    found = [
        ring("all-gather of weights", gathered, shards, (2 * layers + 1) * micro_batches, among_shards),
        ring("reduce-scatter of gradients", FP32 * count.total, shards, layers + 1, among_shards),
    ]
    copies = n // shards
    if copies > 1:
        found.append(ring("all-reduce of gradient shares", FP32 * count.total / shards, copies, layers + 1, True))
    if matrices:
        # Rows become whole matrices and rows again: each device sends its share, there and back.
        found.append(ring("all-to-all for Muon", 2 * FP32 * matrices / shards, shards, 2 * 7, among_shards))
    return found


def seconds(collective: Collective, device: Device) -> float:
    """Return how long an exchange takes."""
    far = collective.between_machines
    link = LINK_SHARE * (device.between if far else device.inside)
    hop = HOP_BETWEEN if far else HOP_INSIDE
    return collective.bytes / link + collective.calls * hop * math.ceil(math.log2(max(2, collective.devices)))


def exposed(found: list[Collective], device: Device, hiding: float, layers: int) -> float:
    """Return the part that computing does not hide: what exceeds `hiding` seconds, and the first or last block's share.

    Muon's exchange stands alone, and is never hidden.
    """
    alone = sum(seconds(one, device) for one in found if one.name.startswith("all-to-all"))
    beside = sum(seconds(one, device) for one in found) - alone
    return alone + max(beside - hiding, beside / layers)
