"""First weights for a Gemma 3 that learns from nothing."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Block, Gemma3, RMSNorm


def unfilled(config: Gemma3Config, kernel: str = "sdpa") -> Gemma3:
    """Return a model of shapes without numbers, on the meta device."""
    with torch.device("meta"), _Unwritten():
        return Gemma3(config, kernel)


class _Unwritten(TorchFunctionMode):
    """Let torch.nn.init do nothing: drawing numbers for the meta device loads torch's compiler, which takes seconds."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return options["tensor"] if "tensor" in options else arguments[0]
        return function(*arguments, **options)


def initialise(
    model: Gemma3, seed: int, damp_branches: bool = False, put: Callable[[Tensor, Tensor], object] = Tensor.copy_
) -> None:
    """Draw every matrix from N(0, initializer_range^2) and set every norm to gain 1, as a pure function of the seed.

    The norms after attention and MLP undo any scaling of the matrices before them, so the usual smaller first output
    matrices do nothing here. `damp_branches` sets those norms' gain to 1/sqrt(2 L) instead, which keeps the residual
    stream near its first size through L layers. `put(parameter, values)` is how a parameter gets its values.
    """
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                put(module.weight, torch.randn(module.weight.shape, generator=generator) * std)
            elif isinstance(module, RMSNorm):
                put(module.weight, torch.zeros(module.weight.shape))
        if damp_branches:
            gain = 1 / math.sqrt(2 * model.config.num_hidden_layers)
            for block in model.blocks:
                assert isinstance(block, Block)
                for norm in (block.post_attention_norm, block.post_mlp_norm):
                    put(norm.weight, torch.full(norm.weight.shape, gain - 1))
