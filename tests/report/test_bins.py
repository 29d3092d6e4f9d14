"""Binning: bounded, and every spike is kept."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmule.report.bins import Bins, Place

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)


def bins_of(values: list[float], limit: int = 16) -> Bins:
    bins = Bins(limit)
    for step, value in enumerate(values, start=1):
        bins.add(Place(step, 10.0 * step, 0.5 * step), value)
    return bins


@given(VALUES)
def test_bins_are_bounded_and_hold_real_points_in_order(values: list[float]) -> None:
    points = bins_of(values).extremes()
    assert len(points) <= 2 * 16 + 1
    assert [point.step for point in points] == sorted({point.step for point in points})
    assert all(values[int(point.step) - 1] == point.value for point in points)
    assert all((point.tokens, point.seconds) == (10 * point.step, 0.5 * point.step) for point in points)
    assert min(point.value for point in points) == min(values)
    assert max(point.value for point in points) == max(values)
    assert points[-1].step == len(values)


@given(VALUES)
def test_lowest_and_highest_of_each_bin_are_kept(values: list[float]) -> None:
    bins = bins_of(values)
    kept = {point.value for point in bins.extremes()}
    for start in range(0, len(values), bins.width):
        own = values[start : start + bins.width]
        assert {min(own), max(own)} <= kept


@given(VALUES)
def test_moving_average_over_everything_is_the_mean(values: list[float]) -> None:
    bins = bins_of(values)
    averages = bins.smoothed(share=3)
    assert averages[-1].step == len(values)
    assert averages[len(averages) // 2].value == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_what_is_not_finite_is_counted_apart() -> None:
    bins = bins_of([1.0, math.nan, 2.0, math.inf, -math.inf, 3.0])
    assert [point.value for point in bins.extremes()] == [1.0, 2.0, 3.0]
    assert bins.not_finite == 3


def test_steps_that_come_again_replace_the_old_ones() -> None:
    bins = bins_of([float(step) for step in range(1, 11)])
    bins.drop_from(6)
    bins.add(Place(6, 60.0, 3.0), 99.0)
    assert [point.value for point in bins.extremes()] == [1, 2, 3, 4, 5, 99]


def test_a_single_spike_in_a_long_run_is_kept() -> None:
    draw = random.Random(0)
    values = [draw.random() for _ in range(25_000)]
    values[17_123], values[4_321] = 9.0, -9.0
    bins = bins_of(values, limit=600)
    assert {(17_124, 9.0), (4_322, -9.0)} <= {(point.step, point.value) for point in bins.extremes()}
    assert len(bins.extremes()) < 1300
