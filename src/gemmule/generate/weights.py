"""Weights made ready for decoding, from outside of the model: in pages the processor finds fast, or in eight bits."""

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemmule.model.gemma3 import Gemma3

_ALIGNMENT = 64
_ROWS = 4096  # that are rounded at once, so that a vocabulary needs no copy of itself


@torch.no_grad()
def lay_out(model: Gemma3) -> Gemma3:
    """Move the weights of a model on the CPU into one block of huge pages, where the system has such; return it.

    Reading a matrix of hundreds of megabytes is a fifth faster there, for the processor looks up fewer addresses.
    """
    weights = [weight for _, weight in all_weights(model) if weight.device.type == "cpu"]
    sizes = [-(-weight.data.nbytes // _ALIGNMENT) * _ALIGNMENT for weight in weights]
    if not hasattr(mmap, "MADV_HUGEPAGE") or not sum(sizes):
        return model
    # Private, for what processes could share gets huge pages on few systems only.
    block = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them
        block.madvise(mmap.MADV_HUGEPAGE)
    at = 0
    for weight, size in zip(weights, sizes, strict=True):
        held = weight.data
        room = torch.frombuffer(block, dtype=held.dtype, count=held.numel(), offset=at).view(held.shape)
        weight.data = room.copy_(held)
        at += size
    return model


class Int8:
    """A matrix in eight bits, one scale a row; stands where a module has its `weight`.

    `functional.linear` and `functional.embedding` take it like a tensor of its original dtype, and compute with what
    it stands for.
    """

    def __init__(self, weight: Tensor) -> None:
        held = weight.detach()
        self.scales = (held.abs().amax(dim=1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.data = torch.empty_like(held, dtype=torch.int8)
        for first in range(0, len(held), _ROWS):
            rows = slice(first, first + _ROWS)
            self.data[rows] = (held[rows].float() / self.scales[rows, None]).round()
        self.dtype, self.device, self.shape = weight.dtype, weight.device, weight.shape

    def wide(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return rows as numbers of the original dtype."""
        return (self.data[rows].float() * self.scales[rows][..., None]).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], arguments: Sequence[Any], options: Any = None
    ) -> Any:
        """Stand in for a tensor in the two functions that modules give their weights to."""
        if function is functional.linear:
            x, weight = arguments[:2]
            return functional.linear(x, weight.wide())
        if function is functional.embedding:
            tokens, weight = arguments[:2]
            return weight.wide(tokens)
        raise TypeError(f"int8 weights stand in for linear and embedding alone, not for {function.__name__}")


@torch.no_grad()
def quantise(model: Gemma3) -> Gemma3:
    """Turn every matrix of a model into eight bits, in place; return it. Norms stay; it can no longer be trained."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = Int8(module.weight)
            del module.weight
            module.weight = weight  # type: ignore[assignment]
    return model


def int8_weights(model: Gemma3) -> list[tuple[str, Int8]]:
    """Return the matrices of a model that were turned into eight bits, by name."""
    found = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    return [(f"{name}.weight", weight) for name, weight in found if isinstance(weight, Int8)]


def all_weights(model: Gemma3) -> list[tuple[str, Tensor | Int8]]:
    """Return every weight of a model by name, the matrices in eight bits last."""
    return [*model.named_parameters(), *int8_weights(model)]
