"""A short trial before a run: which kernel of attention is the fastest here, for rows like its own."""

import time

import torch
from torch import Tensor

from gemmule.model.attention import KERNELS, Visibility, block_of
from gemmule.model.config import Gemma3Config

AUTO = "auto"
# Tokens of a trial, which then takes some hundredths of a second; the first one to be compiled, some seconds more.
TOKENS, TRIALS = 2048, 5


def time_kernels(
    config: Gemma3Config, context: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, float]:
    """Return the seconds of each kernel, there and back for one local layer over rows of `context` tokens.

    Empty where all of them would do the same: long rows that no window cuts.
    """
    window = config.window("local")
    block = block_of(context, window)
    if block is None:
        return {}
    positions = torch.arange(context, device=device)[None]
    uncut = window is None or context <= window
    visibility = {
        "sdpa": Visibility(positions, positions, window, causal=uncut),
        "folded": Visibility(positions, positions, window, block=block),
    }
    return {name: _seconds(name, config, seen, dtype, device, compiled) for name, seen in visibility.items()}


def _seconds(
    name: str, config: Gemma3Config, visibility: Visibility, dtype: torch.dtype, device: torch.device, compiled: bool
) -> float:
    context = visibility.query_positions.shape[1]
    rows, scale = max(1, TOKENS // context), config.query_pre_attn_scalar**-0.5

    def drawn(heads: int) -> Tensor:
        return torch.randn(rows, heads, context, config.head_dim, dtype=dtype, device=device, requires_grad=True)

    query, key, value = map(drawn, (config.num_attention_heads, *2 * (config.num_key_value_heads,)))
    kernel = torch.compile(KERNELS[name]) if compiled else KERNELS[name]
    times = []
    for _ in range(2 + TRIALS):  # the first two warm up
        began = time.perf_counter()
        torch.autograd.grad(kernel(query, key, value, visibility, scale, 0.0).sum(), (query, key, value))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[2:])
