"""Checks of the weights, and of the activations that they lead to."""

import math

import torch
from torch import Tensor, nn

from gemmule.evaluate.doctor.model import Answer, ModelUnderTest
from gemmule.model.finite import nonfinite_weights
from gemmule.model.gemma3 import RMSNorm

FP16_LARGEST = 65_504
_TOKENS = 256  # random ones, enough to reach the largest activations of most models


def weights(test: ModelUnderTest) -> Answer:
    """Every weight is finite and no matrix is all zeros; the range of norm gains is reported (Google's reach 1657)."""
    nonfinite = nonfinite_weights(test.model)
    if nonfinite:
        more = f" (and {len(nonfinite) - 1} more)" if len(nonfinite) > 1 else ""
        return "failed", f"{nonfinite[0]} holds NaN or infinity{more}"
    matrices = [(name, each.weight) for name, each in test.model.named_modules() if _is_matrix(each)]
    if zeros := [name for name, weight in matrices if not weight.any()]:
        more = f" (and {len(zeros) - 1} more)" if len(zeros) > 1 else ""
        return "failed", f"{zeros[0]}.weight is all zeros{more}"
    named = [(name, module.weight) for name, module in test.model.named_modules() if isinstance(module, RMSNorm)]
    low, lowest = min((1 + weight.min().item(), name) for name, weight in named)
    high, highest = max((1 + weight.max().item(), name) for name, weight in named)
    usual = "" if low > -1 and high < 10 else ", far from 1, as in Google's own models"
    return "passed", f"all finite; norm gains from {low:.3g} ({lowest}) to {high:.3g} ({highest}){usual}"


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)


def activations(test: ModelUnderTest) -> Answer:
    """The residual stream stays finite; whether it fits into fp16 is reported, and is no failure."""
    peaks: dict[str, float] = {}

    def record(name: str) -> object:
        def hook(_module: nn.Module, _given: object, result: Tensor) -> None:
            peaks[name] = result.detach().abs().max().item()

        return hook

    hooks = [
        block.register_forward_hook(record(f"layer {layer}"))  # type: ignore[arg-type]
        for layer, block in enumerate(test.model.blocks)
    ]
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, test.config.max_position_embeddings)
    tokens = torch.randint(test.config.vocab_size, (1, length), generator=generator)
    try:
        with torch.no_grad():
            test.model(tokens.to(test.model.embedding.weight.device), output_head=lambda hidden, _: hidden)
    finally:
        for hook in hooks:
            hook.remove()
    if bad := next((name for name, peak in peaks.items() if not math.isfinite(peak)), None):
        return "failed", f"the residual stream after {bad} holds {peaks[bad]}"
    name = max(peaks, key=peaks.__getitem__)
    fits = "fits into fp16" if peaks[name] < FP16_LARGEST / 4 else "too close to fp16's 65504, use bf16 or fp32"
    if peaks[name] >= FP16_LARGEST:
        fits = "overflows in fp16, whose largest number is 65504; use bf16 or fp32"
    return "passed", f"largest value of the residual stream {peaks[name]:,.1f}, after {name}: {fits}"
