"""Weight initialization of a Gemma 3 that is trained from scratch."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Block, Gemma3, RMSNorm


def meta_model(config: Gemma3Config, kernel: str = "sdpa") -> Gemma3:
    """Return a model without storage: fp32 parameters on the meta device."""
    with torch.device("meta"), _SkipInit():
        model = Gemma3(config, kernel)
    return model.float()  # whatever torch's default dtype is


class _SkipInit(TorchFunctionMode):
    """Make torch.nn.init a no-op: on the meta device it would import torch's compiler, which takes seconds."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return options["tensor"] if "tensor" in options else arguments[0]
        return function(*arguments, **options)


def init_weights(
    model: Gemma3, seed: int, damp_branches: bool = False, copy: Callable[[Tensor, Tensor], object] = Tensor.copy_
) -> None:
    """Draw every matrix from N(0, initializer_range^2) and set every norm to gain 1, as a pure function of the seed.

    The norms after attention and MLP undo any scaling of the matrices before them, so the usual smaller first output
    matrices do nothing here. `damp_branches` sets those norms' gain to 1/sqrt(2 L) instead, which keeps the residual
    stream near its first size through L layers. `copy(parameter, values)` writes a parameter's values.
    """
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                copy(module.weight, torch.randn(module.weight.shape, generator=generator, dtype=torch.float32) * std)
            elif isinstance(module, RMSNorm):
                copy(module.weight, torch.zeros(module.weight.shape, dtype=torch.float32))
        if damp_branches:
            gain = 1 / math.sqrt(2 * model.config.num_hidden_layers)
            for block in model.blocks:
                assert isinstance(block, Block)
                for norm in (block.post_attention_norm, block.post_mlp_norm):
                    copy(norm.weight, torch.full(norm.weight.shape, gain - 1, dtype=torch.float32))
