"""How fast this machine trains, measured in about two seconds: blocks of a few widths, and the head."""

import math
import time
from itertools import pairwise
from typing import NamedTuple

import torch

from gemmule.model.config import Gemma3Config
from gemmule.train.autotune import Precision, Trial, settle_precision, time_layer_and_head
from gemmule.train.muon import ITERATIONS

# Widths that are timed, the narrowest first, until the time is up.
_WIDTHS = (128, 256, 512, 1024, 2048)
_SECONDS = 1.0
_ROWS, _CONTEXT, _VOCABULARY = 4, 256, 4096
# Tokens of a trial on a GPU, which a few rows would leave idle.
_GPU_ROWS = 64
# Share of a step's time that compiled blocks save, as measured for the recipes of this repository (docs/log.md).
COMPILED = 0.3


class Speed(NamedTuple):
    """What a device computes in a second, forward and backward, by the width of the model."""

    device: torch.device
    precision: Precision
    layer: dict[int, float]  # hidden size: FLOP/s of a block
    head: dict[int, float]  # hidden size: FLOP/s of the head and its loss

    def step_seconds(self, config: Gemma3Config, batch_size: int, context: int, compiled: bool) -> float:
        """Estimate the seconds of an optimizer step with Muon."""
        tokens, width = batch_size * context, config.hidden_size
        layers = config.num_hidden_layers * layer_flops(config, context) * tokens / _at(self.layer, width)
        head = head_flops(config) * tokens / _at(self.head, width)
        saved = COMPILED if compiled else 0.0
        return (layers + head) * (1 - saved) + muon_flops(config) / _at(self.layer, width)

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s at hidden size {width}" for width, rate in self.layer.items())
        return f"measured on this machine's {self.device.type} in {self.precision}: {rates}"


def measure(device: torch.device) -> Speed:
    """Measure how fast a device trains, in the number format that is faster there."""
    rows = _GPU_ROWS if device.type == "cuda" else _ROWS
    precision = settle_precision(_trial(_WIDTHS[1], rows, device), "auto")
    layer: dict[int, float] = {}
    head: dict[int, float] = {}
    began = time.perf_counter()
    for width in _WIDTHS:
        trial = _trial(width, rows, device)
        block_seconds, head_seconds = time_layer_and_head(trial, precision)
        layer[width] = layer_flops(trial.config, _CONTEXT) * rows * _CONTEXT / block_seconds
        head[width] = head_flops(trial.config) * rows * _CONTEXT / head_seconds
        if time.perf_counter() - began > _SECONDS / 2:  # the next one takes some four times as long
            break
    return Speed(device, precision, layer, head)


def matrices(config: Gemma3Config) -> list[tuple[int, int]]:
    """Return the shapes of a block's matrices, the short side first."""
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys, inner = config.num_key_value_heads * config.head_dim, config.intermediate_size
    shapes = [(queries, width), (width, queries), (keys, width), (keys, width), *3 * [(inner, width)]]
    return [(min(shape), max(shape)) for shape in shapes]


def block_parameters(config: Gemma3Config) -> int:
    """Count the parameters in the matrices of all blocks."""
    return config.num_hidden_layers * sum(short * long for short, long in matrices(config))


def parameters(config: Gemma3Config) -> int:
    """Count all parameters of a model whose embedding is the head as well."""
    width, layers = config.hidden_size, config.num_hidden_layers
    norms = layers * (4 * width + 2 * config.head_dim) + width
    return block_parameters(config) + config.vocab_size * width + norms


def layer_flops(config: Gemma3Config, context: int) -> float:
    """Count the floating-point operations of a block for a token, forward and backward."""
    products = 6 * sum(short * long for short, long in matrices(config))
    span = min(context, config.sliding_window)
    return products + 12 * config.num_attention_heads * config.head_dim * span / 2


def head_flops(config: Gemma3Config) -> float:
    """Count the floating-point operations of the head for a token, forward and backward."""
    return 6.0 * config.vocab_size * config.hidden_size


def muon_flops(config: Gemma3Config) -> float:
    """Count the floating-point operations of Muon's update of all blocks."""
    one = sum(ITERATIONS * (4 * short * short * long + 2 * short**3) for short, long in matrices(config))
    return float(config.num_hidden_layers * one)


def _trial(width: int, rows: int, device: torch.device) -> Trial:
    config = Gemma3Config(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=1,
        sliding_window_pattern=2,
        num_attention_heads=width // 64,
        num_key_value_heads=1,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=128,
    )
    return Trial(config, rows, _CONTEXT, True, device)


def _at(rates: dict[int, float], width: int) -> float:
    """Interpolate a rate in the logarithm of the width; beyond the widths that were timed, the nearest one's."""
    known = sorted(rates)
    if width <= known[0]:
        return rates[known[0]]
    for below, above in pairwise(known):
        if width <= above:
            share = math.log(width / below) / math.log(above / below)
            return rates[below] * (1 - share) + rates[above] * share
    return rates[known[-1]]
