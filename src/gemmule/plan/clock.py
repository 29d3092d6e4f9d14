"""How long a step, a validation and a run take, from the traced operations and a device's prices."""

from collections.abc import Sequence
from typing import NamedTuple

from gemmule.model.config import Kind
from gemmule.plan.memory import Update
from gemmule.plan.prices import Prices
from gemmule.plan.trace import Trace


class Work(NamedTuple):
    """The FLOPs of a micro-batch."""

    forward: float
    backward: float  # what is computed again included

    @property
    def total(self) -> float:
        """There and back."""
        return self.forward + self.backward


def flops(traced: Trace, kinds: Sequence[Kind]) -> Work:
    """Add up a micro-batch's products of matrices; attention counts its whole table, as it is computed."""
    there, back = 0.0, 0.0
    for segment, _ in traced.step(kinds):
        share = traced.loss_share if segment.part == "loss" else 1.0
        work = share * sum(operation.flops for operation in traced.operations[segment.start : segment.stop])
        there, back = (there + work, back) if segment.forward else (there, back + work)
    return Work(there, back)


def micro_batch_seconds(traced: Trace, kinds: Sequence[Kind], prices: Prices) -> tuple[float, float]:
    """Return the seconds of a micro-batch there and back."""
    of_part = {
        (segment.part, segment.forward): prices.seconds(traced.operations[segment.start : segment.stop])
        * (traced.loss_share if segment.part == "loss" else 1.0)
        for segment in traced.segments
    }
    there = back = 0.0
    for segment, _ in traced.step(kinds):
        seconds = of_part[segment.part, segment.forward]
        there, back = (there + seconds, back) if segment.forward else (there, back + seconds)
    return there, back


def update_seconds(update: Update, shares: int, prices: Prices) -> float:
    """Return the seconds of one update, which devices that share the weights divide among them."""
    return sum(times * prices.seconds([operation]) for operation, times in update.operations) / shares
