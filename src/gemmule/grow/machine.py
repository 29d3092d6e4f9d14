"""How fast this machine trains, measured in about two seconds: blocks of a few widths, and the head."""

import math
import time
from itertools import pairwise
from typing import NamedTuple

import torch

from gemmule.grow.shapes import head_flops, layer_flops, muon_flops, shape
from gemmule.model.config import Gemma3Config
from gemmule.train.autotune import Precision, Trial, settle_precision, time_layer_and_head

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


def _trial(width: int, rows: int, device: torch.device) -> Trial:
    # A layer with sliding-window attention, as most are.
    config = shape(width, 1, _VOCABULARY).replace(sliding_window_pattern=2)
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
