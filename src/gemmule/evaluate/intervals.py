"""How sure a figure is: 95 % intervals of means over documents, of their paired differences, and of rates.

Documents are the sample: intervals say how figures vary with the choice of the documents, not of the training run.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FEWEST = 10  # documents that an interval needs
CONFIDENCE = 0.95
POWER = 0.8  # the probability with which `Difference.needed` documents tell a difference apart
_RESAMPLES = 1999
_AT_ONCE = 1 << 22  # draws that are held at once
_MOST = 20_000  # documents that are resampled; of more the normal distribution is as good
_ROUNDING = 1e-6  # relative differences below this are those of fp32
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)

Column = npt.NDArray[np.float64]
# Sums of columns (R,k) -> a value that scaling them leaves as it is, (R,), and its gradient by the sums, (R,k).
_Statistic = Callable[[Column], tuple[Column, Column]]


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """How much larger one model's mean is than another's on the same documents."""

    difference: float
    interval: Interval | None  # None for fewer than FEWEST documents
    significant: bool  # whether 0 is outside of the interval
    needed: int | None  # about how many documents would tell such a difference apart; None where it is 0


def ratio_interval(values: Column, sizes: Column) -> Interval | None:
    """Return the interval of sum(values) / sum(sizes) over documents (n,); None for fewer than 10.

    Bootstrap-t with a fixed seed: resamples of documents, each with a standard error of its own. Unlike percentile and
    BCa intervals it covers 95 % from ten documents on, of unequal lengths too (docs/evaluate.md).
    """
    ratio = values.sum() / sizes.sum()
    columns = np.stack([values - ratio * sizes, sizes], axis=1)
    interval, _ = _studentized(columns, _ratio)
    return None if interval is None else Interval(ratio + interval.low, ratio + interval.high)


def paired_difference(values: tuple[Column, Column], sizes: tuple[Column, Column]) -> Difference:
    """Compare the ratios of two models, each sum(values) / sum(sizes), over the same documents (n,)."""
    ratios = [float(own.sum() / size.sum()) for own, size in zip(values, sizes, strict=True)]
    difference = ratios[0] - ratios[1]
    centered = [own - ratio * size for own, ratio, size in zip(values, ratios, sizes, strict=True)]
    columns = np.stack([centered[0], sizes[0], centered[1], sizes[1]], axis=1)
    found, error = _studentized(columns, _difference_of_ratios)
    interval = None if found is None else Interval(difference + found.low, difference + found.high)
    rounding = abs(difference) <= _ROUNDING * max(map(abs, ratios))
    significant = interval is not None and not rounding and not interval.low <= 0 <= interval.high
    needed = None
    if interval is not None and not rounding:
        needed = max(FEWEST, math.ceil(len(columns) * ((_Z + NormalDist().inv_cdf(POWER)) * error / difference) ** 2))
    return Difference(difference, interval, significant, needed)


def rate_interval(hits: int, count: int) -> Interval | None:
    """Return Wilson's score interval of a rate; None where nothing was counted."""
    if not count:
        return None
    rate, weight = hits / count, _Z**2 / count
    middle = (rate + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(rate * (1 - rate) / count + weight / 4 / count)
    return Interval(max(0.0, middle - half) if hits else 0.0, min(1.0, middle + half) if hits < count else 1.0)


def _ratio(sums: Column) -> tuple[Column, Column]:
    value = sums[:, 0] / sums[:, 1]
    return value, np.stack([1 / sums[:, 1], -value / sums[:, 1]], axis=1)


def _difference_of_ratios(sums: Column) -> tuple[Column, Column]:
    one, one_gradient = _ratio(sums[:, :2])
    other, other_gradient = _ratio(sums[:, 2:])
    return one - other, np.concatenate([one_gradient, -other_gradient], axis=1)


def _studentized(columns: Column, statistic: _Statistic) -> tuple[Interval | None, float]:
    """Return the interval around a statistic that is 0 for all documents (n,k) together, and its standard error."""
    count = len(columns)
    if count < FEWEST:
        return None, math.nan
    moments = (columns[:, :, None] * columns[:, None, :]).reshape(count, -1)
    everything = np.concatenate([columns, moments], axis=1)
    _, errors = _values_and_errors(everything.sum(axis=0, keepdims=True), count, columns.shape[1], statistic)
    error = float(errors[0])
    if count > _MOST or error == 0:
        return Interval(-_Z * error, _Z * error), error
    random, scores = np.random.default_rng(0), []
    rows = max(1, _AT_ONCE // count)
    for first in range(0, _RESAMPLES, rows):
        draws = random.integers(0, count, (min(rows, _RESAMPLES - first), count))
        weights = np.stack([np.bincount(draw, minlength=count) for draw in draws])
        values, own_errors = _values_and_errors(weights @ everything, count, columns.shape[1], statistic)
        scores.append(values[own_errors > 0] / own_errors[own_errors > 0])
    low, high = np.quantile(np.concatenate(scores), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(-high * error), float(-low * error)), error


def _values_and_errors(sums: Column, count: int, width: int, statistic: _Statistic) -> tuple[Column, Column]:
    """Return a statistic of samples, and its standard errors, from the sums (R,k + k x k) of columns and moments."""
    values, gradients = statistic(sums[:, :width])
    squares = np.einsum("ri,rij,rj->r", gradients, sums[:, width:].reshape(-1, width, width), gradients)
    return values, np.sqrt(np.maximum(squares, 0.0) * count / (count - 1))
