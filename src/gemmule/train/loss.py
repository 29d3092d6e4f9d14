"""The loss as a readout: cross-entropy summed over the trained targets, without ever holding all logits."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gemmule.model.gemma3 import Readout, all_logits

IGNORED = -100
# Logits held at once: 2^25 in fp32 are 128 MiB.
LOGITS_AT_ONCE = 2**25


def summed_loss(targets: Tensor) -> Readout:
    """Return a readout that sums -log p(target) in nats over targets (B,T) other than IGNORED, as a scalar.

    Divide by the number of trained targets of the whole optimizer step, not of this call.
    """

    def read(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        pieces = _pieces(hidden, targets, vocabulary.shape[0])
        if len(pieces) == 1:
            return _chunk_loss(*pieces[0], vocabulary)
        # Each chunk's logits are made again on the way back instead of being kept.
        losses = [checkpoint(_chunk_loss, *piece, vocabulary, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum()

    return read


def _pieces(hidden: Tensor, targets: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    flat, goals = hidden.flatten(0, 1), targets.flatten()
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return list(zip(torch.split(flat, rows), torch.split(goals, rows), strict=True))


def _chunk_loss(hidden: Tensor, targets: Tensor, vocabulary: Tensor) -> Tensor:
    return functional.cross_entropy(all_logits(hidden, vocabulary), targets, ignore_index=IGNORED, reduction="sum")
