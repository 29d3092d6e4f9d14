"""Sampling: from logits to the next token by temperature, top-k, top-p and min-p, then one draw."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from gemmule.errors import ModelError
from gemmule.fields import NotNegative
from gemmule.settings import Settings

EXCLUDED = float("-inf")  # the logit of a token that cannot be drawn
# What `draw_unchecked` returns for a row whose logits are not finite; no token has this id.
INVALID = -1
# Temperatures below this would be rounded to zero in fp32; all of them are greedy.
_MIN_TEMPERATURE = 1e-37


class SamplingSettings(Settings):
    """Sampling parameters; the defaults sample from the model's own distribution, temperature 0 is greedy."""

    temperature: NotNegative = Field(1.0, description="above 1 flattens the distribution; 0 takes the likeliest token")
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="keep the k likeliest tokens; 0 keeps all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="keep the likeliest tokens that together reach this probability"
    )
    min_p: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="keep tokens at least this likely, as a share of the likeliest one"
    )


# The default of the commands: varied samples, without tokens that are far less likely than the likeliest.
STORYTELLING = SamplingSettings(temperature=0.7, min_p=0.1)

Rule = Callable[[Tensor, SamplingSettings], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


def temperature(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Flatten (above 1) or sharpen (below 1) the distribution."""
    if settings.temperature == 1:
        return logits
    # The likeliest token's logit becomes 0, so that no temperature, however small, makes it infinite.
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(settings.temperature, _MIN_TEMPERATURE)


def _top_k_active(logits: Tensor, settings: SamplingSettings) -> bool:
    """Whether top_k is below the vocabulary size."""
    return 0 < settings.top_k < logits.shape[-1]


def top_k(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Mask all but the k likeliest tokens; of equally likely ones the lowest ids are kept."""
    if not _top_k_active(logits, settings):
        return logits
    smallest = logits.topk(settings.top_k).values[..., -1:]
    above, equal = logits > smallest, logits == smallest
    remaining = settings.top_k - above.sum(dim=-1, keepdim=True)
    return logits.masked_fill(~(above | equal & (equal.cumsum(dim=-1) <= remaining)), EXCLUDED)


def top_p(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Mask all but the smallest set of likeliest tokens that reaches probability p (arXiv 1904.09751).

    Of equally likely ones the lowest ids are kept.
    """
    if settings.top_p == 1:
        return logits
    if _top_k_active(logits, settings):
        # Only what top_k left is sorted: to sort 262,144 takes a third as long as a token of the 270M.
        indices = logits.topk(settings.top_k).indices.sort().values
        ordered, order = logits.gather(-1, indices).sort(descending=True, stable=True)
        indices = indices.gather(-1, order)
    else:
        ordered, indices = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    beyond = torch.ones_like(logits, dtype=torch.bool).scatter(-1, indices, before >= settings.top_p)
    return logits.masked_fill(beyond, EXCLUDED)


def min_p(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Mask tokens far less likely than the likeliest (arXiv 2407.01082); equally likely ones go together."""
    if settings.min_p == 0:
        return logits
    threshold = logits.amax(dim=-1, keepdim=True) + math.log(settings.min_p)
    return logits.masked_fill(logits < threshold, EXCLUDED)


# In the order of application.
RULES: dict[str, Rule] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}


def probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Return the distribution (B,V) that `draw` samples from, for logits (B,V)."""
    if settings.temperature == 0:
        return functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    for rule in RULES.values():
        logits = rule(logits, settings)
    return logits.softmax(dim=-1)


def draw(logits: Tensor, settings: SamplingSettings, generators: Generators) -> Tensor:
    """Sample one token id per row of logits (B,V), as (B,), with one generator for all rows or one per row.

    Generators are on the CPU. ModelError where a row's logits are not finite: NaN or infinity for some token, or minus
    infinity for all.
    """
    chosen = draw_unchecked(logits, settings, generators)
    refuse_invalid(chosen.tolist())
    return chosen


def draw_unchecked(logits: Tensor, settings: SamplingSettings, generators: Generators) -> Tensor:
    """Sample without synchronizing with a GPU; a row whose logits are not finite gets INVALID."""
    highest = logits.max(dim=-1)  # on the CPU three times as fast as argmax; the value is NaN if any logit is
    chosen = highest.indices if settings.temperature == 0 else _sample(logits, settings, generators)
    return chosen.where(highest.values.isfinite(), INVALID)


def refuse_invalid(ids: list[int]) -> None:
    """Raise ModelError if `draw_unchecked` found logits that are not finite."""
    if INVALID in ids:
        raise ModelError(
            "the model's logits are not finite: its weights or the numbers in its config.json are damaged; "
            "see `gemmule doctor MODEL`"
        )


def _sample(logits: Tensor, settings: SamplingSettings, generators: Generators) -> Tensor:
    cumulative = probabilities(logits.double(), settings).cumsum(dim=-1)
    # Below the last sum, so that a token of probability zero at the end is never reached.
    uniform = _uniform(len(logits), generators).to(logits.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)


def _uniform(rows: int, generators: Generators) -> Tensor:
    """Return one number in [0, 1) per row, (B,1)."""
    if isinstance(generators, torch.Generator):
        return torch.rand(rows, 1, generator=generators, dtype=torch.float64, device="cpu")
    return torch.cat([torch.rand(1, 1, generator=each, dtype=torch.float64, device="cpu") for each in generators])
