"""Sampling: from logits to the next token by biases, penalties, temperature, top-k, top-p and min-p, then one draw.

`draw_rows` is the reference, which runs on every device; `native/sampler.py` does the same in C for logits in the CPU's
memory. A row's token depends on its own logits, `Row` and uniform number alone, whatever the other rows are.
"""

import math
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, Field, PlainSerializer
from torch import Tensor
from torch.nn import functional

from gemmule.errors import ModelError, RecipeError
from gemmule.fields import NotNegative, Noun, Positive
from gemmule.settings import Settings

EXCLUDED = float("-inf")  # the logit of a token that cannot be drawn
# What is drawn where a row's logits are not finite, and where no token may be drawn; no token has these ids.
INVALID, NO_CANDIDATE = -1, -2
# Temperatures below this would be rounded to zero in fp32; all of them are greedy.
MIN_TEMPERATURE = 1e-37
_LARGEST = torch.finfo(torch.float32).max


_BIASES = "a table of token ids, each with a number from -100 to 100"


def _sorted_pairs(given: object) -> object:
    """Turn a mapping, whose keys are text in TOML and JSON, into sorted pairs, which can be hashed."""
    if isinstance(given, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in given):
        given = dict(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"must be {_BIASES}")
    pairs = {int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key: given[key] for key in given}
    return tuple(sorted(pairs.items())) if all(isinstance(key, int) for key in pairs) else tuple(pairs.items())


_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[
    tuple[tuple[Annotated[int, Field(ge=0, lt=2**31)], _Bias], ...],
    BeforeValidator(_sorted_pairs),
    PlainSerializer(lambda pairs: {str(token): bias for token, bias in pairs}),
    Noun(_BIASES),
]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


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
    repetition_penalty: Positive = Field(
        1.0, description="divides positive logits of the prompt's and the reply's tokens, and multiplies negative ones"
    )
    presence_penalty: _Penalty = Field(0.0, description="is subtracted from the logits of the reply's tokens")
    frequency_penalty: _Penalty = Field(
        0.0, description="is subtracted from the logits of the reply's tokens, as often as they occur there"
    )
    logit_bias: _Biases = Field((), description="is added to the logits of single tokens")

    @property
    def penalizes(self) -> bool:
        """Whether the tokens of prompt and reply count."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocabulary(self, size: int) -> None:
        """Raise RecipeError where a bias is given to a token that a vocabulary of this size lacks."""
        if self.logit_bias and (last := self.logit_bias[-1][0]) >= size:
            raise RecipeError(f"logit_bias: there is no token {last}: the model's vocabulary ends at {size - 1}")


# The default of the commands: varied samples, without tokens that are far less likely than the likeliest.
STORYTELLING = SamplingSettings(temperature=0.7, min_p=0.1)


class History:
    """The distinct tokens of a prompt and its reply, with their counts in the reply: what penalties depend on."""

    __slots__ = ("_places", "counts", "tokens")

    def __init__(self, prompt: Iterable[int], reply: Iterable[int] = ()) -> None:
        """Begin with a prompt, and with what was drawn already."""
        self.tokens = array("i", dict.fromkeys(prompt))
        self.counts = array("i", bytes(4 * len(self.tokens)))  # in the reply alone
        self._places = {token: place for place, token in enumerate(self.tokens)}
        for token in reply:
            self.append(token)

    def append(self, token: int) -> None:
        """Count a token that was drawn."""
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[place] += 1


class Row:
    """How to draw the tokens of one reply; made once per reply, and updated before each draw.

    `uniform` is a number in [0, 1), as `uniform()` gives it. The ids in `excluded` cannot be drawn now, nor can those
    whose bit in `allowed` is 0: int32 (W,) on the CPU, bit t % 32 of word t // 32 for token t.
    """

    __slots__ = ("allowed", "excluded", "history", "packed", "settings", "uniform")

    def __init__(
        self,
        settings: SamplingSettings,
        prompt: Iterable[int] = (),
        reply: Iterable[int] = (),
        *,
        uniform: float = 0.0,
        excluded: Collection[int] = (),
        allowed: Tensor | None = None,
    ) -> None:
        """Keep a history of the prompt and of what was drawn already, where a penalty depends on it."""
        self.settings, self.uniform, self.excluded, self.allowed = settings, uniform, excluded, allowed
        self.history = History(prompt, reply) if settings.penalizes else None
        self.packed: Any = None  # the settings as C has them, once it has

    def append(self, token: int) -> None:
        """Count a token that was drawn."""
        if self.history is not None:
            self.history.append(token)


def uniform(seed: int, sample: int, index: int) -> float:
    """Return the number in [0, 1), a multiple of 2^-53, by which token `index` of sample `sample` is drawn.

    A pure function, the same on every machine. OverflowError for numbers that are not from 0 to 2^64 - 1.
    """
    key = seed.to_bytes(8, "little") + sample.to_bytes(8, "little") + index.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8, person=b"gemmule-sampling").digest(), "little") >> 11) * 2.0**-53


Rule = Callable[[Tensor, Row], Tensor]


def logit_bias(logits: Tensor, row: Row) -> Tensor:
    """Add a bias to the logits of single tokens."""
    biases = row.settings.logit_bias
    if not biases:
        return logits
    added = logits.new_tensor([bias for _, bias in biases], dtype=torch.float64)
    return _changed(logits, [token for token, _ in biases], lambda chosen: chosen + added)


def repetition_penalty(logits: Tensor, row: Row) -> Tensor:
    """Make the tokens of prompt and reply less likely, by a factor (arXiv 1909.05858)."""
    penalty = row.settings.repetition_penalty
    if penalty == 1 or row.history is None:
        return logits
    return _changed(
        logits, row.history.tokens, lambda chosen: torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    )


def presence_penalty(logits: Tensor, row: Row) -> Tensor:
    """Make the tokens of the reply less likely, however often they occur."""
    penalty = row.settings.presence_penalty
    if penalty == 0 or row.history is None:
        return logits
    drawn = [token for token, count in zip(row.history.tokens, row.history.counts, strict=True) if count]
    return _changed(logits, drawn, lambda chosen: chosen - penalty)


def frequency_penalty(logits: Tensor, row: Row) -> Tensor:
    """Make the tokens of the reply less likely, the more often they occur."""
    penalty = row.settings.frequency_penalty
    if penalty == 0 or row.history is None:
        return logits
    counts = logits.new_tensor(row.history.counts.tolist(), dtype=torch.float64)
    return _changed(logits, row.history.tokens, lambda chosen: chosen - penalty * counts)


def _changed(logits: Tensor, tokens: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the logits of some tokens in float64, rounded to float32 within its range; excluded ones stay excluded.

    With numbers of float32 alone, C and this module agree on which tokens are equally likely.
    """
    if not len(tokens):
        return logits
    index = _index(logits, tokens)
    before = logits[..., index].double()
    after = change(before).clamp(-_LARGEST, _LARGEST).float().double()
    return logits.index_copy(-1, index, after.where(before > EXCLUDED, EXCLUDED).to(logits.dtype))


def _index(logits: Tensor, tokens: Collection[int]) -> Tensor:
    """Return tokens as an index; IndexError beyond the vocabulary, which would stop a GPU for good."""
    if min(tokens) < 0 or max(tokens) >= logits.shape[-1]:
        raise IndexError(f"tokens from {min(tokens)} to {max(tokens)}: the vocabulary has {logits.shape[-1]}")
    return torch.tensor([*tokens], dtype=torch.long, device=logits.device)


def exclude(logits: Tensor, row: Row) -> Tensor:
    """Mask the tokens that cannot be drawn now. The rules leave them masked, so it is done before them."""
    if row.excluded:
        logits = logits.index_fill(-1, _index(logits, row.excluded), EXCLUDED)
    if row.allowed is not None:
        check_words(row.allowed, logits.shape[-1])
        tokens = torch.arange(logits.shape[-1], device=logits.device)
        bits = row.allowed.to(logits.device)[tokens // 32] >> (tokens % 32)
        logits = logits.masked_fill(bits % 2 == 0, EXCLUDED)
    return logits


def check_words(allowed: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless `allowed` has a bit for every token, in the form that `Row` describes."""
    words = (vocabulary + 31) // 32
    if allowed.dtype != torch.int32 or allowed.dim() != 1 or len(allowed) < words or not allowed.is_contiguous():
        raise ValueError(f"allowed is {allowed.dtype} {tuple(allowed.shape)}: must be int32 ({words},), contiguous")


def temperature(logits: Tensor, row: Row) -> Tensor:
    """Flatten (above 1) or sharpen (below 1) the distribution."""
    if row.settings.temperature == 1:
        return logits
    # The likeliest token's logit becomes 0, so that no temperature, however small, makes it infinite.
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(row.settings.temperature, MIN_TEMPERATURE)


def _top_k_active(logits: Tensor, settings: SamplingSettings) -> bool:
    """Whether top_k is below the vocabulary size."""
    return 0 < settings.top_k < logits.shape[-1]


def top_k(logits: Tensor, row: Row) -> Tensor:
    """Mask all but the k likeliest tokens; of equally likely ones the lowest ids are kept."""
    if not _top_k_active(logits, row.settings):
        return logits
    smallest = logits.topk(row.settings.top_k).values[..., -1:]
    above, equal = logits > smallest, logits == smallest
    remaining = row.settings.top_k - above.sum(dim=-1, keepdim=True)
    return logits.masked_fill(~(above | equal & (equal.cumsum(dim=-1) <= remaining)), EXCLUDED)


def top_p(logits: Tensor, row: Row) -> Tensor:
    """Mask all but the smallest set of likeliest tokens that reaches probability p (arXiv 1904.09751).

    Of equally likely ones the lowest ids are kept.
    """
    if row.settings.top_p == 1:
        return logits
    if _top_k_active(logits, row.settings):
        # Only what top_k left is sorted: to sort 262,144 takes a third as long as a token of the 270M.
        indices = logits.topk(row.settings.top_k).indices.sort().values
        ordered, order = logits.gather(-1, indices).sort(descending=True, stable=True)
        indices = indices.gather(-1, order)
    else:
        ordered, indices = logits.sort(descending=True, stable=True)
    # Not a softmax: the weights of equally likely tokens are 1, whose sums are exact.
    weights = (ordered - ordered[..., :1]).exp()
    reached = _running_sum(weights)
    beyond = torch.ones_like(logits, dtype=torch.bool)
    beyond.scatter_(-1, indices, reached - weights >= row.settings.top_p * reached[..., -1:])
    return logits.masked_fill(beyond, EXCLUDED)


def min_p(logits: Tensor, row: Row) -> Tensor:
    """Mask tokens far less likely than the likeliest (arXiv 2407.01082); equally likely ones go together."""
    if row.settings.min_p == 0:
        return logits
    threshold = logits.amax(dim=-1, keepdim=True) + math.log(row.settings.min_p)
    return logits.masked_fill(logits < threshold, EXCLUDED)


# In the order of application.
RULES: dict[str, Rule] = {
    "logit_bias": logit_bias,
    "repetition_penalty": repetition_penalty,
    "presence_penalty": presence_penalty,
    "frequency_penalty": frequency_penalty,
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
}


def _running_sum(weights: Tensor) -> Tensor:
    """Return the cumulative sum over the last dimension, in the same order every time.

    A GPU scans a single row in blocks whose order may differ from run to run, and several rows one by one.
    """
    return torch.stack((weights, weights)).cumsum(dim=-1)[0]


def _narrow(logits: Tensor, row: Row) -> Tensor:
    """Apply every rule to logits (...,V)."""
    logits = exclude(logits, row)
    for rule in RULES.values():
        logits = rule(logits, row)
    return logits


def probabilities(logits: Tensor, row: Row) -> Tensor:
    """Return the distribution (...,V) that is drawn from, for logits (...,V)."""
    logits = _narrow(logits, row)
    if row.settings.temperature == 0:
        return functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    return logits.softmax(dim=-1)


def draw_rows(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Draw a token of each row of logits (B,V), as ids (B,) on their device.

    A GPU is waited for only where a row has biases, penalties or exclusions, which are copied to it. INVALID for a
    row whose logits are not finite: NaN or infinity for some token, or minus infinity for all; NO_CANDIDATE where its
    exclusions leave no token. IndexError for a token that the vocabulary lacks.
    """
    if len(rows) != len(logits):
        raise ValueError(f"{len(rows)} rows to draw from logits of {len(logits)}")
    # One by one: kernels may sum several rows in another order than one, and choose another token at a rounding edge.
    drawn = [_draw_row(logits[index], row) for index, row in enumerate(rows)]
    return torch.stack(drawn) if drawn else torch.empty(0, dtype=torch.long, device=logits.device)


def _draw_row(logits: Tensor, row: Row) -> Tensor:
    narrowed = _narrow(logits.double(), row)
    highest = narrowed.max(dim=-1)
    # Of several maxima torch gives the first, on a CPU and on a GPU.
    greedy = row.settings.temperature == 0
    chosen = highest.indices if greedy else _find_token(narrowed - highest.values, row.uniform)
    chosen = chosen.where(highest.values > EXCLUDED, NO_CANDIDATE)
    return chosen.where(logits.max().isfinite(), INVALID)  # the maximum is NaN if any logit is


def _find_token(logits: Tensor, number: float) -> Tensor:
    """Return the token of logits (V,) at which the cumulative sum of weights first exceeds a share of their total."""
    reached = _running_sum(logits.exp())
    # Below the last sum, so that a token of probability zero at the end is never reached.
    return torch.searchsorted(reached, number * reached[-1:], right=True)[0]


class Query(NamedTuple):
    """Which log-probabilities to return of a row of logits: that of `token`, and the `top_n` highest."""

    row: int
    token: int
    top_n: int = 0


class LogProbabilities(NamedTuple):
    """Natural logarithms of probabilities by the model's own distribution, before any rule."""

    token: float  # of the token that was asked for
    likeliest: tuple[tuple[int, float], ...]  # ids with theirs, those of lower ids first where they are equal


def log_probabilities(logits: Tensor, queries: Sequence[Query]) -> list[LogProbabilities]:
    """Return log-probabilities from rows of logits (B,V), in float64; tokens of probability zero are not listed.

    All are NaN where a row's logits are not finite. IndexError for a row or a token that is not there.
    """
    return [_log_probabilities(logits[query.row], query) for query in queries]


def _log_probabilities(logits: Tensor, query: Query) -> LogProbabilities:
    if query.row < 0 or not 0 <= query.token < len(logits):
        raise IndexError(f"{query}: the vocabulary has {len(logits)}")
    if not logits.max().isfinite():
        return LogProbabilities(math.nan, ())
    known = logits.double().log_softmax(dim=-1)
    few = top_k(known, Row(SamplingSettings(top_k=query.top_n)))
    ids = (few > EXCLUDED).nonzero().squeeze(-1)[: None if query.top_n else 0]
    ordered, order = few[ids].sort(descending=True, stable=True)
    return LogProbabilities(known[query.token].item(), tuple(zip(ids[order].tolist(), ordered.tolist(), strict=True)))


class Sampler(NamedTuple):
    """The two functions of sampling, in one implementation."""

    draw_rows: Callable[[Tensor, Sequence[Row]], Tensor]
    log_probabilities: Callable[[Tensor, Sequence[Query]], list[LogProbabilities]]


REFERENCE = Sampler(draw_rows, log_probabilities)


def refuse_invalid(ids: list[int]) -> None:
    """Raise ModelError where a row's logits were not finite, and RecipeError where no token could be drawn."""
    if INVALID in ids:
        raise ModelError(
            "the model's logits are not finite: its weights or the numbers in its config.json are damaged; "
            "see `gemmule doctor MODEL`"
        )
    if NO_CANDIDATE in ids:
        raise RecipeError(
            "no token can be drawn: the grammar and the minimum length exclude all of the vocabulary; allow one"
        )
