"""Training objectives: what a run minimizes, apart from how it is trained."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from gemmule.data.batches import Batch
from gemmule.train.loss import summed_loss

# The forward of a model or of its wrapper: (tokens, documents=..., output_head=...) -> what the output head returns.
Forward = Callable[..., Tensor]


class Objective(Protocol):
    """A loss over a batch: a sum, which the loop divides by the count of the whole optimizer step."""

    def count(self, batch: Batch) -> int:
        """Return what the summed loss of a batch is divided by, such as its number of targets."""
        ...

    def summed_loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the summed loss of a micro-batch, which is on the model's device, as a scalar."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return further metrics of the steps since the last call, averaged over them."""
        ...


class NextToken:
    """Cross-entropy of the next token, for pretraining and for supervised fine-tuning with a loss mask."""

    def __init__(self, compiled: bool = False) -> None:
        self._compiled = compiled

    def count(self, batch: Batch) -> int:
        """Return the number of targets."""
        return batch.num_targets

    def summed_loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Sum -log p(target) in nats."""
        return forward(batch.tokens, documents=batch.documents, output_head=summed_loss(batch.targets, self._compiled))

    def metrics(self) -> dict[str, float]:
        """Return nothing beyond the loss."""
        return {}
