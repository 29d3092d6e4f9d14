"""Log-probabilities of targets as an output head, with gradient and in chunks, for preferences and rewards."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemmule.model.gemma3 import OutputHead
from gemmule.train.loss import IGNORED, add_gradients, chunks, logits_of


def target_log_probabilities(targets: Tensor) -> OutputHead:
    """Return an output head that gives log p(target) (B,T) in nats and fp32, 0 for targets that are IGNORED.

    For losses that weigh sequences against each other: the weights of their gradients are known only afterwards, so the
    backward pass computes the logits again. What is ignored costs nothing.
    """

    def read(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        known = targets != IGNORED
        arguments = (hidden[known], vocabulary, targets[known])
        found: Tensor = _TargetLogProbabilities.apply(*arguments)  # type: ignore[no-untyped-call]
        return torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device).masked_scatter(known, found)

    return read


class _TargetLogProbabilities(torch.autograd.Function):
    """Keeps the states and the log-sum-exp of their logits, and neither logits nor probabilities."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probability of targets (M) after hidden (M,D), with the head's vocabulary (V,D)."""
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            entries, sums, found = vocabulary.to(ctx.dtype), [], []
            for chunk in chunks(hidden, vocabulary):
                logits = logits_of(hidden[chunk].to(ctx.dtype), entries).float()
                sums.append(logits.logsumexp(dim=-1))
                found.append(logits.gather(1, targets[chunk, None])[:, 0] - sums[-1])
        empty = torch.zeros(0, dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(hidden, vocabulary, targets, torch.cat([empty, *sums]))
        return torch.cat([empty, *found])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients: one-hot minus softmax, times the gradient of each log-probability."""
        hidden, vocabulary, targets, sums = ctx.saved_tensors
        to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        to_vocabulary = torch.zeros_like(vocabulary, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            entries = vocabulary.to(ctx.dtype)
            for chunk in chunks(hidden, vocabulary):
                states, weights = hidden[chunk].to(ctx.dtype), wanted[chunk, None]
                slopes = (logits_of(states, entries).float() - sums[chunk, None]).exp_().mul_(-weights)
                grad_logits = slopes.scatter_add_(1, targets[chunk, None], weights).to(ctx.dtype)
                own = None if to_hidden is None else to_hidden[chunk]
                add_gradients(grad_logits, states, entries, own, to_vocabulary)
        return to_hidden, to_vocabulary, None
