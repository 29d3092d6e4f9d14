"""Training objectives: what a run minimizes, apart from how it is trained."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from gemmule.data.batches import Batch
from gemmule.distributed import World
from gemmule.train.loss import summed_loss

# The forward of a model or of its wrapper: (tokens, documents=..., output_head=...) -> what the output head returns.
Forward = Callable[..., Tensor]


class Objective(Protocol):
    """A loss over a batch: a sum, which the loop divides by the count of the whole optimizer step."""

    # Whether rows are made by the model as it is: they are not read ahead, and some steps have nothing to learn from.
    on_policy: bool

    def begin_step(self, batch: Batch) -> int:
        """Begin an optimizer step; return what its summed loss is divided by, such as the number of targets."""
        ...

    def summed_loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the summed loss of a micro-batch, which is on the model's device, as a scalar."""
        ...

    def metrics(self, world: World) -> dict[str, float]:
        """Return further metrics of the step over all ranks; every rank calls it."""
        ...


class NextToken:
    """Cross-entropy of the next token, for pretraining and for supervised fine-tuning with a loss mask."""

    on_policy = False

    def __init__(self, compiled: bool = False) -> None:
        self._compiled = compiled

    def begin_step(self, batch: Batch) -> int:
        """Return the number of targets."""
        return batch.num_targets

    def summed_loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Sum -log p(target) in nats."""
        return forward(batch.tokens, documents=batch.documents, output_head=summed_loss(batch.targets, self._compiled))

    def metrics(self, world: World) -> dict[str, float]:  # noqa: ARG002 - part of the protocol
        """Return nothing beyond the loss."""
        return {}
