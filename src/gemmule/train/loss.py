"""The loss as a readout: cross-entropy summed over the trained targets, without ever holding all logits."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemmule.model.gemma3 import Readout

IGNORED = -100
# Logits held at once: 2^24 in fp32 are 64 MiB. GPUs, which like larger pieces, hold four times as many.
LOGITS_AT_ONCE = 2**24
# On a CPU chunks that its caches hold are faster, unless they have fewer rows than pay for their share of a gradient.
CACHED_LOGITS, WORTHWHILE_ROWS = 2**22, 512
# Words that are multiplied at once: libraries copy what they multiply into an order of their own.
WORDS_AT_ONCE = 2**15
# Elements of a gradient that a CPU adds at once.
ADDED_AT_ONCE = 2**20


def summed_loss(targets: Tensor, compiled: bool = False) -> Readout:
    """Return a readout that sums -log p(target) in nats over targets (B,T) other than IGNORED, as a scalar.

    Divide by the number of trained targets of the whole optimizer step, not of this call.
    """

    def read(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        losses = _compiled(_losses_and_slopes) if compiled else _losses_and_slopes
        arguments = (hidden.flatten(0, 1), vocabulary, targets.flatten(), losses)
        loss: Tensor = _SummedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss

    return read


class _SummedLoss(torch.autograd.Function):
    """Chunk by chunk, the gradient of logits is made while they are at hand, and neither is kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor, losses: Callable[..., tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Sum the loss of hidden (M,D) against targets (M), and make the gradients of hidden and vocabulary (V,D)."""
        kind, rows = hidden.device.type, rows_at_once(len(vocabulary), hidden.device)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        total = torch.zeros((), device=hidden.device)
        to_hidden = to_vocabulary = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            to_hidden, to_vocabulary = torch.zeros_like(hidden), torch.zeros_like(vocabulary, dtype=torch.float32)
        with torch.autocast(kind, enabled=False):
            words = vocabulary.to(dtype)
            parts = [slice(part, part + WORDS_AT_ONCE) for part in range(0, len(words), WORDS_AT_ONCE)]
            for first in range(0, len(hidden), rows):
                chunk = slice(first, first + rows)
                states = hidden[chunk].to(dtype)
                loss, slope = losses(_joined([states @ words[part].T for part in parts]), targets[chunk])
                total += loss
                if to_hidden is not None and to_vocabulary is not None:
                    for part in parts:
                        to_hidden[chunk] += slope[:, part] @ words[part]
                        _grow(to_vocabulary[part], slope[:, part].T, states)
        ctx.gradients = to_hidden, to_vocabulary
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale what forward made, and hand it over: what is kept here would be copied."""
        (to_hidden, to_vocabulary), ctx.gradients = ctx.gradients, None
        return to_hidden.mul_(wanted), to_vocabulary.mul_(wanted), None, None


def _joined(products: list[Tensor]) -> Tensor:
    """Put the logits of a chunk together; a function, so that nobody holds the parts beside the whole."""
    return torch.cat(products, dim=1) if len(products) > 1 else products[0]


def _grow(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add a product to what is fp32, in place."""
    if total.is_cuda and one.dtype != total.dtype:  # within the product, which there adds up in fp32 anyway
        torch.addmm(total, one, other, out_dtype=total.dtype, out=total)
        return
    more = one @ other
    # On a CPU in pieces that its caches hold: there torch first copies what is of another dtype.
    rows = max(1, ADDED_AT_ONCE // total.shape[1]) if total.is_cpu else len(total)
    torch._foreach_add_(torch.split(total, rows), torch.split(more, rows))


def _losses_and_slopes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the losses of logits (rows,V), and return the gradient by the logits: softmax minus one-hot, 0 if ignored."""
    known = targets != IGNORED
    targets = targets.where(known, 0)[:, None]
    wide = logits.float()
    top = wide.amax(dim=-1, keepdim=True)
    aimed = wide.gather(1, targets)
    raised = wide.sub_(top).exp_()  # in place of the logits, and once: it is the dearest operation
    total = raised.sum(dim=-1, keepdim=True)
    loss = (total.log() + top - aimed)[:, 0].where(known, 0.0).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == targets.where(known[:, None], IGNORED)
    return loss, raised.mul_(known[:, None] / total).sub_(hit.to(logits.dtype)).to(logits.dtype)


@cache
def _compiled(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(function, dynamic=False)


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Return how many rows of logits a chunk has."""
    if device.type != "cpu":
        return max(1, 4 * LOGITS_AT_ONCE // vocabulary)
    return max(1, min(LOGITS_AT_ONCE // vocabulary, max(WORTHWHILE_ROWS, CACHED_LOGITS // vocabulary)))
