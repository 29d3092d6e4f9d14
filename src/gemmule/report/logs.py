"""The logs of a run, read as they grow and kept in bounded memory: metrics and samples."""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from gemmule.growing_file import GrowingFile
from gemmule.report.bins import Bins, Place, Point

_MOST_CURVES = 40
_MOST_MARKS = 200  # of a kind
_MOST_PROMPTS, _MOST_SAMPLES = 8, 8
LONGEST_SAMPLE = 2000  # characters shown of one
# Keys of a line that are no curves: where it stands, and counts.
_PLACE = {"step", "tokens", "seconds", "skipped_steps", "spike"}


class Metrics:
    """What metrics.jsonl says so far: a curve for each number in it, validations, spikes and skipped steps."""

    def __init__(self) -> None:
        self.curves: dict[str, Bins] = {}
        self.lines = 0
        self.overlaps = 0  # how often a step came again
        self.last: dict[str, float] = {}  # the newest finite value of each key
        self.best: dict[str, float] | None = None  # the line of the lowest validation loss
        self.validations = 0
        self.skipped: list[Point] = []
        self.spikes: list[Point] = []

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in the next line; what is no number is passed over."""
        numbers = {key: value for key, value in line.items() if is_number(value)}
        step = numbers.get("step")
        if step is None or not math.isfinite(step):
            return
        if step <= self.last.get("step", -1):
            self.overlaps += 1
            self._drop_from(step)
        self.lines += 1
        place = Place(step, numbers.get("tokens", math.nan), numbers.get("seconds", math.nan))
        for key, value in numbers.items():
            if math.isfinite(value):
                self.last[key] = value
            curve = self.curves.get(key)
            if curve is None:
                if key in _PLACE or len(self.curves) == _MOST_CURVES:
                    continue
                curve = self.curves[key] = Bins()
            curve.add(place, value)
        if "val_loss" in numbers:
            self.validations += 1
            if self.best is None or numbers["val_loss"] < self.best["val_loss"]:
                self.best = numbers if math.isfinite(numbers["val_loss"]) else self.best
        if "skipped_steps" in line and "loss" not in line:
            self._mark(self.skipped, Point(*place, math.nan))
        if line.get("spike") and "loss" in numbers:
            self._mark(self.spikes, Point(*place, numbers["loss"]))

    @property
    def not_finite(self) -> int:
        """How many values were NaN or infinite."""
        return sum(curve.not_finite for curve in self.curves.values())

    def _mark(self, marks: list[Point], point: Point) -> None:
        marks.append(point)
        del marks[: max(0, len(marks) - _MOST_MARKS)]

    def _drop_from(self, step: float) -> None:
        for curve in self.curves.values():
            curve.drop_from(step)
        for marks in (self.skipped, self.spikes):
            marks[:] = [mark for mark in marks if mark.step < step]
        if self.best is not None and self.best["step"] >= step:
            self.best = None
            for point in self.curves["val_loss"].extremes():
                if self.best is None or point.value < self.best["val_loss"]:
                    self.best = {"step": point.step, "tokens": point.tokens, "val_loss": point.value}


class Sample(NamedTuple):
    """A continuation of a prompt after so many steps, cut to what a page shows."""

    step: float
    text: str
    characters: int  # before it was cut
    other: dict[str, float]  # further numbers of the line, such as a reward


class Samples:
    """The first and the newest samples of each prompt, and some between."""

    def __init__(self) -> None:
        self.prompts: dict[str, list[Sample]] = {}
        self.left_out = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in the next line."""
        prompt, text, step = line.get("prompt"), line.get("text"), line.get("step")
        if not isinstance(prompt, str) or not isinstance(text, str) or not is_number(step):
            return
        prompt = prompt[:LONGEST_SAMPLE]
        if prompt not in self.prompts and len(self.prompts) == _MOST_PROMPTS:
            self.left_out += 1
            return
        kept = self.prompts.setdefault(prompt, [])
        while kept and kept[-1].step >= step:  # a resumed run logs it again
            kept.pop()
        other = {key: value for key, value in line.items() if key != "step" and is_number(value)}
        kept.append(Sample(step, text[:LONGEST_SAMPLE], len(text), other))
        if len(kept) > _MOST_SAMPLES:
            self._thin(kept)

    def _thin(self, kept: list[Sample]) -> None:
        """Leave out the sample whose neighbors are closest, of those between the first and the last."""
        gaps = [kept[index + 1].step - kept[index - 1].step for index in range(1, len(kept) - 1)]
        del kept[1 + gaps.index(min(gaps))]
        self.left_out += 1


class RunLogs:
    """The metrics and samples of a run folder, as far as they are written."""

    def __init__(self, metrics: Path, samples: Path) -> None:
        self._files = GrowingFile(metrics), GrowingFile(samples)
        self.metrics, self.samples = Metrics(), Samples()

    def version(self) -> tuple[tuple[int, int, int], ...]:
        """Return what changes whenever one of the files does."""
        return tuple(file.version() for file in self._files)

    @property
    def damaged(self) -> int:
        """How many lines could not be read."""
        return sum(file.damaged for file in self._files)

    def update(self) -> None:
        """Read what was appended; start over where a run was resumed from an earlier step, or begun again."""
        metrics, samples = self._files
        if metrics.was_rewritten():
            self.metrics = Metrics()
        with suppress(OSError):  # a page shows what can be read
            for line in metrics.read():
                self.metrics.add(line)
        if samples.was_rewritten():
            self.samples = Samples()
        with suppress(OSError):
            for line in samples.read():
                self.samples.add(line)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number that a float holds exactly."""
    return type(value) is float or (type(value) is int and abs(value) < 2**53)
