"""Chunked cross-entropy as an output head: summed over the targets, without ever holding all logits."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemmule.compiler import compile_function
from gemmule.model.gemma3 import OutputHead

IGNORED = -100
# Logits held at once: 2^24 in fp32 are 64 MiB. GPUs, which like larger pieces, hold four times as many.
LOGITS_AT_ONCE = 2**24
# On a CPU chunks that its caches hold are faster, unless they have fewer rows than pay for their share of a gradient.
CACHED_LOGITS, WORTHWHILE_ROWS = 2**22, 512
# Vocabulary entries per matmul: libraries copy its operands into a layout of their own.
VOCABULARY_CHUNK = 2**15
# Elements of a gradient that a CPU accumulates at once.
ACCUMULATED_AT_ONCE = 2**20


def summed_loss(targets: Tensor, compiled: bool = False) -> OutputHead:
    """Return an output head that sums -log p(target) in nats over targets (B,T) other than IGNORED, as a scalar.

    Divide by the number of targets of the whole optimizer step, not of this call. Under no_grad and
    inference_mode no gradient is computed or held.
    """

    def read(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        losses = losses_and_gradients(compiled)
        # Asked here, for inside of an autograd function gradients are always off.
        arguments = (hidden.flatten(0, 1), vocabulary, targets.flatten(), losses, torch.is_grad_enabled())
        loss: Tensor = _SummedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss

    return read


class _SummedLoss(torch.autograd.Function):
    """Chunk by chunk, the gradient of logits is made while they are at hand, and neither is kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor, losses: "_Losses", gradients: bool
    ) -> Tensor:
        """Sum the loss of hidden (M,D) against targets (M), and make the gradients of hidden and vocabulary (V,D)."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.zeros_like(hidden) if gradients and ctx.needs_input_grad[0] else None
        wanted = gradients and ctx.needs_input_grad[1]
        to_vocabulary = torch.zeros_like(vocabulary, dtype=torch.float32) if wanted else None
        with_gradient = to_hidden is not None or to_vocabulary is not None
        with torch.autocast(kind, enabled=False):
            entries = vocabulary.to(dtype)
            for chunk in chunks(hidden, vocabulary):
                states = hidden[chunk].to(dtype)
                loss, grad_logits = losses(logits_of(states, entries), targets[chunk], with_gradient)
                total += loss
                if grad_logits is not None:
                    own = None if to_hidden is None else to_hidden[chunk]
                    add_gradients(grad_logits, states, entries, own, to_vocabulary)
        ctx.gradients = to_hidden, to_vocabulary
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what forward made, and hand it over: what is kept here would be copied."""
        made, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(wanted) for gradient in made), None, None, None


def chunks(hidden: Tensor, vocabulary: Tensor) -> Iterator[slice]:
    """Yield the rows of hidden (M,D) whose logits are held at once."""
    rows = rows_at_once(len(vocabulary), hidden.device)
    return (slice(first, first + rows) for first in range(0, len(hidden), rows))


def logits_of(states: Tensor, entries: Tensor) -> Tensor:
    """Return the logits of states (rows,D) by entries (V,D) of the vocabulary."""
    return _concatenate([states @ part.T for part in torch.split(entries, VOCABULARY_CHUNK)])


def add_gradients(
    grad_logits: Tensor, states: Tensor, entries: Tensor, to_hidden: Tensor | None, to_vocabulary: Tensor | None
) -> None:
    """Add the gradients of states (rows,D) and entries (V,D) that follow from that of logits (rows,V), in place."""
    for first in range(0, len(entries), VOCABULARY_CHUNK):
        part = slice(first, first + VOCABULARY_CHUNK)
        if to_hidden is not None:
            to_hidden += grad_logits[:, part] @ entries[part]
        if to_vocabulary is not None:
            _accumulate_matmul(to_vocabulary[part], grad_logits[:, part].T, states)


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Concatenate the logits of a chunk; a function, so that the parts are freed before the loss is computed."""
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _accumulate_matmul(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add a matmul to an fp32 tensor, in place."""
    if total.is_cuda and one.dtype != total.dtype:  # within the matmul, which accumulates in fp32 there anyway
        torch.addmm(total, one, other, out_dtype=total.dtype, out=total)
        return
    more = one @ other
    # On a CPU in pieces that its caches hold: there torch first copies what is of another dtype.
    rows = max(1, ACCUMULATED_AT_ONCE // total.shape[1]) if total.is_cpu else len(total)
    torch._foreach_add_(torch.split(total, rows), torch.split(more, rows))


def _losses_and_slopes(logits: Tensor, targets: Tensor, with_gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """Sum the losses of logits (rows,V), and return the gradient by the logits: softmax minus one-hot, 0 if ignored.

    The gradient is None unless it is asked for by `with_gradient`.
    """
    known = targets != IGNORED
    targets = targets.where(known, 0)[:, None]
    wide = logits.float()
    top = wide.amax(dim=-1, keepdim=True)
    aimed = wide.gather(1, targets)
    raised = wide.sub_(top).exp_()  # in place of the logits, and once: it is the dearest operation
    total = raised.sum(dim=-1, keepdim=True)
    loss = (total.log() + top - aimed)[:, 0].where(known, 0.0).sum()
    if not with_gradient:
        return loss, None
    hit = torch.arange(logits.shape[1], device=logits.device) == targets.where(known[:, None], IGNORED)
    return loss, raised.mul_(known[:, None] / total).sub_(hit.to(logits.dtype)).to(logits.dtype)


_Losses = Callable[..., tuple[Tensor, Tensor | None]]


@cache
def losses_and_gradients(compiled: bool) -> _Losses:
    """Return the function of (logits (rows,V), targets (rows,)) that makes their summed loss and its gradient."""
    return compile_function(_losses_and_slopes, dynamic=False) if compiled else _losses_and_slopes


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Return how many rows of logits a chunk has."""
    if device.type != "cpu":
        return max(1, 4 * LOGITS_AT_ONCE // vocabulary)
    return max(1, min(LOGITS_AT_ONCE // vocabulary, max(WORTHWHILE_ROWS, CACHED_LOGITS // vocabulary)))
