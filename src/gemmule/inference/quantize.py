"""Weight-only int8 quantization, applied to a model from outside."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemmule.errors import ModelError
from gemmule.model.finite import is_finite, refuse_nonfinite_weights
from gemmule.model.gemma3 import Gemma3
from gemmule.model.int8 import round_rows


class Int8:
    """An int8 matrix with one scale per row, which replaces the `weight` of a module.

    `functional.linear` and `functional.embedding` take it like a tensor of its original dtype and dequantize it.
    ModelError where the matrix holds NaN or infinity, which int8 cannot represent.
    """

    def __init__(self, weight: Tensor) -> None:
        held = weight.detach()
        if not is_finite(held):
            raise ModelError("a matrix that holds NaN or infinity cannot be quantized to int8")
        self.data, self.scales = round_rows(held)
        self.dtype, self.device, self.shape = weight.dtype, weight.device, weight.shape

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return rows in the original dtype."""
        return (self.data[rows].float() * self.scales[rows][..., None]).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], arguments: Sequence[Any], options: Any = None
    ) -> Any:
        """Replace a tensor in the two functions that modules pass their weights to."""
        if function is functional.linear:
            x, weight = arguments[:2]
            return functional.linear(x, weight.dequantize())
        if function is functional.embedding:
            tokens, weight = arguments[:2]
            return weight.dequantize(tokens)
        raise TypeError(f"int8 weights support linear and embedding only, not {function.__name__}")


@torch.no_grad()
def quantize(model: Gemma3) -> Gemma3:
    """Quantize every matrix of a model to int8, in place; return it. Norms stay; it can no longer be trained.

    ModelError where a weight is not finite; the model is then left as it was.
    """
    refuse_nonfinite_weights(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = Int8(module.weight)
            del module.weight
            module.weight = weight  # type: ignore[assignment]
    return model


def int8_weights(model: Gemma3) -> list[tuple[str, Int8]]:
    """Return the quantized matrices of a model by name."""
    found = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    return [(f"{name}.weight", weight) for name, weight in found if isinstance(weight, Int8)]


def named_weights(model: Gemma3) -> list[tuple[str, Tensor | Int8]]:
    """Return every weight of a model by name, the quantized matrices last."""
    return [*model.named_parameters(), *int8_weights(model)]
