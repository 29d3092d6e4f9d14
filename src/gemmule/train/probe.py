"""A short trial before a run: which kernel of attention is the fastest here, for rows like its own."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from gemmule.model.attention import KERNELS, Visibility, block_of, rows_in_order
from gemmule.model.config import Gemma3Config

AUTO = "auto"
TRIALS = 5


def tokens_of_a_trial(device: torch.device) -> int:
    """Return how many tokens take some hundredths of a second, and a GPU longer than it takes to launch its kernels."""
    return 2**15 if device.type == "cuda" else 2**11


def flex_trains(config: Gemma3Config, device: torch.device, compiled: bool) -> bool:
    """Whether FlexAttention can train this model: it has no way back on a CPU, and drops no weights."""
    return device.type == "cuda" and compiled and not config.attention_dropout


def time_kernels(
    config: Gemma3Config,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Return the seconds of each kernel, there and back for one local layer over rows of `context` tokens.

    Empty where all of them would do the same: long rows that no window cuts. Kernels that do not run here are told.
    """
    window = config.window("local")
    if block_of(context, window, device) is None:
        return {}
    positions = torch.arange(context, device=device)[None]
    times: dict[str, float] = {}
    for name in ("sdpa", "folded", *(["flex"] if flex_trains(config, device, compiled) else [])):
        visibility = rows_in_order(name, positions, window, None)
        try:
            times[name] = _seconds(name, config, visibility, dtype, device, compiled)
        except RuntimeError as error:  # the compiler's, or out of a GPU's shared memory
            say(f"train.attention: {name} does not run here: {str(error).strip().splitlines()[0]}")
    return times


def _seconds(
    name: str, config: Gemma3Config, visibility: Visibility, dtype: torch.dtype, device: torch.device, compiled: bool
) -> float:
    context = visibility.query_positions.shape[1]
    rows, scale = max(1, tokens_of_a_trial(device) // context), config.query_pre_attn_scalar**-0.5

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
