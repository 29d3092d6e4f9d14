import math
from collections.abc import Iterator

import numpy as np
import pytest

from gemmule.evaluate.intervals import Column, paired_difference, rate_interval, ratio_interval


def drawn(count: int, seed: int) -> tuple[Column, Column]:
    """Draw documents, nats and bytes: of unequal lengths, some harder than others."""
    random = np.random.default_rng([seed, count])
    size = np.round(np.exp(random.normal(6.5, 0.4, count))).astype(np.float64)
    return size * np.exp(random.normal(-1.0, 0.25, count)), size


def test_an_interval_has_the_width_that_statistics_expect() -> None:
    nats, size = drawn(2000, seed=0)
    interval = ratio_interval(nats, size)
    assert interval is not None
    ratio = nats.sum() / size.sum()
    error = np.std(nats - ratio * size) / size.mean() / math.sqrt(len(size))
    assert interval.low == pytest.approx(ratio - 1.96 * error, rel=0.01)
    assert interval.high == pytest.approx(ratio + 1.96 * error, rel=0.01)
    assert ratio_interval(nats, size) == interval, "the seed is fixed"


def test_of_many_documents_the_interval_is_that_of_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    nats, size = drawn(3000, seed=1)
    resampled = ratio_interval(nats, size)
    monkeypatch.setattr("gemmule.evaluate.intervals._MOST", 2000)
    assert ratio_interval(nats, size) == pytest.approx(resampled, rel=2e-3)


def test_too_few_documents_have_no_interval() -> None:
    nats, size = drawn(9, seed=0)
    assert ratio_interval(nats, size) is None
    difference = paired_difference((nats, nats * 2), (size, size))
    assert (difference.interval, difference.significant, difference.needed) == (None, False, None)


def test_documents_that_all_agree_leave_no_doubt() -> None:
    _, size = drawn(10, seed=0)
    assert ratio_interval(size * 2, size) == pytest.approx((2.0, 2.0))


def test_equal_models_are_never_significant() -> None:
    nats, size = drawn(50, seed=0)
    for other in (nats, nats * (1 + 1e-8)):
        assert not paired_difference((nats, other), (size, size)).significant
        assert paired_difference((nats, other), (size, size)).needed is None


def test_paired_documents_show_what_their_means_alone_do_not() -> None:
    nats, size = drawn(100, seed=0)
    other = nats * np.exp(np.random.default_rng(0).normal(0.02, 0.03, 100))
    one_alone, other_alone = ratio_interval(nats, size), ratio_interval(other, size)
    assert one_alone is not None
    assert other_alone is not None
    assert one_alone.high > other_alone.low, "the intervals of the means overlap"
    found = paired_difference((nats, other), (size, size))
    assert found.significant
    assert found.difference < 0
    assert found.interval is not None
    assert found.interval.high < 0


def test_as_many_documents_as_needed_tell_a_difference_apart_in_four_of_five_cases() -> None:
    def pair(count: int, seed: int) -> tuple[Column, Column, Column]:
        nats, size = drawn(count, seed)
        return nats, nats * np.exp(np.random.default_rng([seed, 1]).normal(0.01, 0.08, count)), size

    nats, other, size = pair(20_000, 0)
    needed = paired_difference((nats, other), (size, size)).needed
    assert needed is not None
    assert 100 < needed < 2000
    found = [paired_difference(pair(needed, seed)[:2], (pair(needed, seed)[2],) * 2).significant for seed in range(40)]
    assert 0.6 <= np.mean(found) <= 0.95


def test_tokenizers_that_differ_are_compared_by_their_own_sizes() -> None:
    nats, size = drawn(60, seed=0)
    found = paired_difference((nats, nats * 1.1), (size, size - 1))
    assert found.difference == pytest.approx(nats.sum() / size.sum() - nats.sum() * 1.1 / (size - 1).sum())
    assert found.significant


@pytest.mark.parametrize(
    ("hits", "count", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_rates_have_wilsons_interval(hits: int, count: int, expected: tuple[float, float]) -> None:
    """The table of Newcombe (1998), method 3."""
    assert rate_interval(hits, count) == pytest.approx(expected, abs=5e-5)


def test_a_rate_of_nothing_has_no_interval() -> None:
    assert rate_interval(0, 0) is None
    interval = rate_interval(7, 7)
    assert interval is not None
    assert tuple(interval) == pytest.approx((0.6457, 1.0), abs=1e-4)


def evaluations(count: int, documents: int) -> Iterator[tuple[Column, Column]]:
    return (drawn(documents, seed) for seed in range(count))


# A thousand bootstraps of each size, and two thousand of pairs.
@pytest.mark.slow
@pytest.mark.parametrize("documents", [10, 30, 100, 500])
def test_intervals_cover_what_they_say(documents: int) -> None:
    truth = math.exp(-1 + 0.25**2 / 2)  # in the mean, the lengths say nothing about the nats per byte
    hits = 0
    for nats, size in evaluations(1000, documents):
        interval = ratio_interval(nats, size)
        assert interval is not None
        hits += interval.low <= truth <= interval.high
    assert 930 <= hits <= 970


# Assumed, not measured: two runs of one model differ by 4 % on a story, each in its own way.
@pytest.mark.slow
def test_runs_of_one_model_are_alike_and_2_percent_are_seen_in_500_stories() -> None:
    alike = seen = 0
    for seed, (nats, size) in enumerate(evaluations(1000, 500)):
        random = np.random.default_rng([seed, 2])
        one, other = (nats * np.exp(random.normal(0, 0.04, 500)) for _ in range(2))
        alike += paired_difference((one, other), (size, size)).significant
        seen += paired_difference((one, other * 1.02), (size, size)).significant
    assert alike <= 70
    assert seen >= 990
