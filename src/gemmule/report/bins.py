"""A curve of bounded size that keeps every spike: the lowest and the highest point of each bin, and the mean."""

import math
from typing import NamedTuple


class Place(NamedTuple):
    """Where a point of a curve stands: after so many steps, tokens and seconds."""

    step: float
    tokens: float
    seconds: float


class Point(NamedTuple):
    """A place and the value there."""

    step: float
    tokens: float
    seconds: float
    value: float


class Bin:
    """Consecutive points: how many, the sum of their values, the lowest, the highest and the last."""

    __slots__ = ("count", "highest", "highest_at", "last", "last_at", "lowest", "lowest_at", "sum")

    def __init__(self, place: Place, value: float) -> None:
        self.lowest = self.highest = self.last = self.sum = value
        self.lowest_at = self.highest_at = self.last_at = place
        self.count = 1

    def add(self, place: Place, value: float) -> None:
        """Take in the next point."""
        self.count += 1
        self.sum += value
        self.last_at, self.last = place, value
        if value < self.lowest:
            self.lowest_at, self.lowest = place, value
        elif value > self.highest:
            self.highest_at, self.highest = place, value

    def merge(self, later: "Bin") -> None:
        """Take in the bin that follows."""
        self.count += later.count
        self.sum += later.sum
        self.last_at, self.last = later.last_at, later.last
        if later.lowest < self.lowest:
            self.lowest_at, self.lowest = later.lowest_at, later.lowest
        if later.highest > self.highest:
            self.highest_at, self.highest = later.highest_at, later.highest

    def points(self) -> list[Point]:
        """Return the lowest and the highest point, in their order."""
        return sorted({Point(*self.lowest_at, self.lowest), Point(*self.highest_at, self.highest)})


class Bins:
    """Points in the order in which they come, in at most `limit` bins of equally many, whose number doubles."""

    def __init__(self, limit: int = 600) -> None:
        self._limit, self._bins = limit, list[Bin]()
        self.width = 1  # points of a bin
        self.not_finite = 0

    def add(self, place: Place, value: float) -> None:
        """Take in the next point; NaN and infinity are counted apart."""
        if not math.isfinite(value):
            self.not_finite += 1
        elif self._bins and self._bins[-1].count < self.width:
            self._bins[-1].add(place, value)
        else:
            self._bins.append(Bin(place, value))
            if len(self._bins) > self._limit:
                self._halve()

    def drop_from(self, step: float) -> None:
        """Forget the bins that end at this step or later: they are replaced."""
        while self._bins and self._bins[-1].last_at.step >= step:
            self._bins.pop()

    def _halve(self) -> None:
        pairs = zip(self._bins[::2], self._bins[1::2], strict=False)
        odd = self._bins[-1:] if len(self._bins) % 2 else []
        merged = []
        for earlier, later in pairs:
            earlier.merge(later)
            merged.append(earlier)
        self._bins, self.width = merged + odd, 2 * self.width

    def __bool__(self) -> bool:
        return bool(self._bins)

    @property
    def last(self) -> Point:
        """The newest point."""
        return Point(*self._bins[-1].last_at, self._bins[-1].last)

    @property
    def lowest(self) -> Point:
        """The point of the lowest value."""
        best = min(self._bins, key=lambda each: each.lowest)
        return Point(*best.lowest_at, best.lowest)

    def extremes(self) -> list[Point]:
        """Return the lowest and the highest point of each bin in their order, and the very last one."""
        points = [point for each in self._bins for point in each.points()]
        return points if not points or points[-1] == self.last else [*points, self.last]

    def smoothed(self, share: float = 1 / 30) -> list[Point]:
        """Return a moving average of the bins over a share of the curve, each standing at its bin's last point."""
        side = round(len(self._bins) * share / 2)
        counts, sums = [0], [0.0]
        for each in self._bins:
            counts.append(counts[-1] + each.count)
            sums.append(sums[-1] + each.sum)
        averages = []
        for index, each in enumerate(self._bins):
            start, stop = max(0, index - side), min(len(self._bins), index + side + 1)
            mean = (sums[stop] - sums[start]) / (counts[stop] - counts[start])
            averages.append(Point(*each.last_at, mean))
        return averages
