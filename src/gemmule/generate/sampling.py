"""From logits to the next token: rules that each narrow the choice, then one draw."""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from gemmule.recipe import Settings

NEVER = float("-inf")


class SamplingSettings(Settings):
    """How the next token is chosen; the defaults change nothing, temperature 0 takes the likeliest."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    # Keep the k likeliest tokens; 0 keeps all.
    top_k: Annotated[int, Field(ge=0)] = 0
    # Keep the likeliest tokens that together reach this probability.
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Keep tokens at least this likely, as a share of the likeliest one.
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0


# What the commands tell stories with: each one different, without words that are far less likely than others.
STORYTELLING = SamplingSettings(temperature=0.7, min_p=0.1)

Rule = Callable[[Tensor, SamplingSettings], Tensor]


def temperature(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Flatten (above 1) or sharpen (below 1) the distribution."""
    return logits / settings.temperature


def _few(logits: Tensor, settings: SamplingSettings) -> bool:
    """Whether top_k leaves fewer words than there are."""
    return 0 < settings.top_k < logits.shape[-1]


def top_k(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Rule out all but the k likeliest tokens."""
    if not _few(logits, settings):
        return logits
    smallest = logits.topk(settings.top_k).values[..., -1:]
    return logits.masked_fill(logits < smallest, NEVER)


def top_p(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Rule out all but the smallest set of likeliest tokens that reaches probability p (arXiv 1904.09751)."""
    if settings.top_p == 1:
        return logits
    # Where top_k left few words only these are sorted: to sort 262,144 takes a third as long as a token of the 270M.
    ordered, indices = logits.topk(settings.top_k) if _few(logits, settings) else logits.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    beyond = torch.ones_like(logits, dtype=torch.bool).scatter(-1, indices, before >= settings.top_p)
    return logits.masked_fill(beyond, NEVER)


def min_p(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Rule out tokens far less likely than the likeliest (arXiv 2407.01082)."""
    if settings.min_p == 0:
        return logits
    least = logits.amax(dim=-1, keepdim=True) + math.log(settings.min_p)
    return logits.masked_fill(logits < least, NEVER)


# In the order of application.
RULES: dict[str, Rule] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}


def probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Return the distribution (B,V) that `draw` samples from, for logits (B,V)."""
    if settings.temperature == 0:
        return functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    for rule in RULES.values():
        logits = rule(logits, settings)
    return logits.softmax(dim=-1)


def draw(logits: Tensor, settings: SamplingSettings, generator: torch.Generator) -> Tensor:
    """Choose one token id per row of logits (B,V), as (B,); the generator lives on the CPU."""
    if settings.temperature == 0:
        return logits.max(dim=-1).indices  # on the CPU three times as fast as argmax
    cumulative = probabilities(logits.double(), settings).cumsum(dim=-1)
    # Below the last sum, so that a token of probability zero at the end is never reached.
    lots = torch.rand(logits.shape[0], 1, generator=generator, dtype=torch.float64).to(logits.device)
    return torch.searchsorted(cumulative, lots * cumulative[:, -1:], right=True).squeeze(-1)
