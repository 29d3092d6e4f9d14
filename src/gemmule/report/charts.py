"""The charts of a report: each as SVG for every axis it is drawn by, and as data for the script that zooms."""

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gemmule.report.bins import Point
from gemmule.report.curves_svg import NARROW, WIDE, Line, Marks, chart_svg, with_room
from gemmule.report.summary import RunFacts
from gemmule.report.verdict import best_validation

if TYPE_CHECKING:
    from markupsafe import Markup

Axis = Literal["step", "tokens", "time"]
AXES: tuple[Axis, ...] = ("step", "tokens", "time")
COLORS = 8


class Series(NamedTuple):
    """A curve of a run."""

    name: str
    classes: str
    points: Sequence[Point]
    markers: bool = False


class Chart(NamedTuple):
    """Curves over one pair of axes."""

    identity: str
    title: str
    caption: str
    drawings: list[tuple[Axis, "Markup"]]
    data: dict[str, Any]


class Kind(NamedTuple):
    """How a metric is drawn."""

    title: str
    unit: str
    logarithmic: bool = False


KINDS = {
    "lr": Kind("Learning rate", "learning rate"),
    "grad_norm": Kind("Gradient norm", "gradient norm, before clipping", True),
    "tokens_per_second": Kind("Throughput", "tokens per second"),
    "memory": Kind("Memory", "bytes"),
    "peak_memory": Kind("Peak memory", "bytes"),
}
TAUGHT = ("reward", "kl", "mask", "advantage", "entropy")  # in names of metrics of a run that was taught
_VALIDATION = {"loss", "val_loss", "val_bits_per_byte", "val_perplexity", "val_floor"}


class TimeUnit(NamedTuple):
    """The unit of the axis of time."""

    name: str
    seconds: float


def time_unit(runs: Sequence[RunFacts]) -> TimeUnit:
    """Return a unit in which the longest run is a number that is easy to read."""
    longest = max((facts.last.get("seconds", 0.0) for facts in runs), default=0.0)
    return next(
        (TimeUnit(name, size) for name, size in (("hours", 3600), ("minutes", 60)) if longest > 2 * size), _SECOND
    )


_SECOND = TimeUnit("seconds", 1)


def axes_of(runs: Sequence[RunFacts]) -> list[Axis]:
    """Return the axes that every run's log has."""
    keys = {"step": "step", "tokens": "tokens", "time": "seconds"}
    return [axis for axis in AXES if all(keys[axis] in facts.last for facts in runs)] or ["step"]


def draw_charts(runs: Sequence[RunFacts], bits_only: bool) -> tuple[list[Chart], list[Chart]]:
    """Return the charts of runs, and those of what a taught run adds; `bits_only` leaves out nats per token."""
    drawing = _Drawing(runs)
    charts = [] if bits_only else [drawing.losses()]
    charts.append(drawing.bits_per_byte(bits_only))
    keys = dict.fromkeys(key for facts in runs for key in facts.logs.metrics.curves if key not in _VALIDATION)
    known = [key for key in KINDS if key in keys]
    others = [key for key in keys if key not in KINDS and not key.startswith("val_")]
    taught = [key for key in others if any(word in key.lower() for word in TAUGHT)]
    charts += [drawing.metric(key) for key in [*known, *(key for key in others if key not in taught)]]
    return [chart for chart in charts if chart.drawings], [
        chart for chart in map(drawing.metric, taught) if chart.drawings
    ]


class _Drawing:
    """Draws the charts of some runs in the same colors and axes."""

    def __init__(self, runs: Sequence[RunFacts]) -> None:
        self._runs, self._axes, self._unit = runs, axes_of(runs), time_unit(runs)

    def losses(self) -> Chart:
        """Draw training and validation losses, floors, spikes, skipped steps and resumes."""
        series, shown = list[Series](), list[float]()
        for number, facts in enumerate(self._runs):
            curves, name = facts.logs.metrics.curves, self._name(facts)
            if loss := curves.get("loss"):
                raw = loss.extremes()
                series.append(Series(f"{name}training", f"{_color(number)} raw", raw))
                series.append(Series(f"{name}training, smoothed", f"{_color(number)} smooth", loss.smoothed()))
                shown += [point.value for point in raw[len(raw) // 20 :]]
            if validated := curves.get("val_loss"):
                points = validated.extremes()
                color = f"{_color(number)} dashed" if len(self._runs) > 1 else _color(1)
                series.append(Series(f"{name}validation", f"{color} validation", points, markers=len(points) <= 60))
                shown += [point.value for point in points]
        series += self._floors()
        shown += [point.value for each in series[-1:] if each.classes == "floor" for point in each.points]
        caption = (
            "Nats per token. The faint line holds the lowest and the highest loss of every bin, so that no spike is "
            f"lost; the strong one is a moving average.{self._best()}"
        )
        return self._chart("loss", "Loss", caption, "nats per token", series, shown, self._axes, self._marks())

    def bits_per_byte(self, main: bool) -> Chart:
        """Draw the validation in bits per byte, which compares runs of any tokenizer."""
        series = [
            Series(f"{self._name(facts)}validation", f"{_color(number)} smooth", curve.extremes(), markers=True)
            for number, facts in enumerate(self._runs)
            if (curve := facts.logs.metrics.curves.get("val_bits_per_byte"))
        ]
        axes: list[Axis] = self._axes if main else ["step"]
        caption = f"On validation text; comparable between tokenizers.{self._best() if main else ''}"
        marks = self._marks() if main else []
        return self._chart("bits", "Bits per byte", caption, "bits per byte", series, [], axes, marks)

    def metric(self, key: str) -> Chart:
        """Draw another number of the metrics."""
        kind = KINDS.get(key, Kind(key.replace("_", " "), key.replace("_", " ")))
        series = [
            Series(f"{self._name(facts)}{kind.title.lower()}", f"{_color(number)} smooth", curve.extremes())
            for number, facts in enumerate(self._runs)
            if (curve := facts.logs.metrics.curves.get(key))
        ]
        positive = all(point.value > 0 for each in series for point in each.points)
        return self._chart(
            f"metric-{key}", kind.title, "", kind.unit, series, [], ["step"], logarithmic=kind.logarithmic and positive
        )

    def _chart(
        self,
        identity: str,
        title: str,
        caption: str,
        unit: str,
        series: Sequence[Series],
        shown: Sequence[float],
        axes: Sequence[Axis],
        marks: Sequence[tuple[str, str, list[Point]]] = (),
        logarithmic: bool = False,
    ) -> Chart:
        identity = "".join(letter if letter.isalnum() else "-" for letter in identity)
        bounds = with_room(min(shown), max(shown)) if shown else None
        drawings = []
        for axis in axes:
            lines = [Line(each.classes, list(self._on(axis, each.points)), each.markers) for each in series]
            marked = [
                Marks(kind, [(x, None if math.isnan(y) else y) for x, y in self._on(axis, points)], meaning)
                for kind, meaning, points in marks
            ]
            svg = chart_svg(
                [line for line in lines if line.points],
                title=f"{title} by {axis}",
                description=", ".join(each.name for each in series),
                x_label=self._unit.name if axis == "time" else axis,
                y_label=unit,
                bounds=bounds,
                logarithmic=logarithmic,
                marks=marked,
                identity=f"{identity}-{axis}",
                width=WIDE if len(axes) > 1 or identity == "loss" else NARROW,
            )
            if svg:
                drawings.append((axis, svg))
        data = {
            "id": identity,
            "unit": unit,
            "log": logarithmic,
            "bounds": bounds,
            "series": [self._series_data(each) for each in series],
            "marks": [
                {"kind": kind, "label": meaning, **self._columns(points)} for kind, meaning, points in marks if points
            ],
        }
        return Chart(identity, title, caption, drawings, data)

    def _on(self, axis: Axis, points: Sequence[Point]) -> Iterator[tuple[float, float]]:
        for point in points:
            x = (
                point.seconds / self._unit.seconds
                if axis == "time"
                else point.tokens
                if axis == "tokens"
                else point.step
            )
            if math.isfinite(x):
                yield x, point.value

    def _series_data(self, series: Series) -> dict[str, Any]:
        return {"name": series.name, "classes": series.classes, **self._columns(series.points)}

    def _columns(self, points: Sequence[Point]) -> dict[str, list[float]]:
        return {
            "step": [point.step for point in points],
            "tokens": [point.tokens for point in points],
            "time": [_rounded(point.seconds / self._unit.seconds, 6) for point in points],
            "y": [_rounded(point.value, 5) for point in points],
        }

    def _floors(self) -> Iterator[Series]:
        """Yield one line for each different floor, as long as the longest run that has it."""
        floors = dict[float, RunFacts]()
        for facts in self._runs:
            floor = facts.floor
            if floor is not None and (floor not in floors or floors[floor].step < facts.step):
                floors[floor] = facts
        for floor, facts in floors.items():
            curve = facts.logs.metrics.curves.get("loss") or facts.logs.metrics.curves["val_floor"]
            ends = (curve.extremes()[0], curve.last)
            yield Series("entropy floor", "floor", [end._replace(value=floor) for end in ends])

    def _marks(self) -> list[tuple[str, str, list[Point]]]:
        marks = list[tuple[str, str, list[Point]]]()
        for facts in self._runs:
            metrics, name = facts.logs.metrics, self._name(facts)
            marks.append(("spike", f"{name}spike of the loss", metrics.spikes))
            marks.append(("skipped", f"{name}skipped step", metrics.skipped))
            marks.append(("resume", f"{name}resumed", _resumes(facts)))
        return [mark for mark in marks if mark[2]]

    def _best(self) -> str:
        """Say of each run where its validation was best, and how much worse the last one is."""
        found = [(facts.name, said) for facts in self._runs if (said := best_validation(facts))]
        if len(self._runs) == 1:
            return "".join(f" {said[0].upper()}{said[1:]}." for _, said in found)
        return "".join(f" {name}: {said}." for name, said in found)

    def _name(self, facts: RunFacts) -> str:
        return f"{facts.name}, " if len(self._runs) > 1 else ""


def _resumes(facts: RunFacts) -> list[Point]:
    """Return where a run was resumed, at the nearest logged step."""
    curve = facts.logs.metrics.curves.get("loss")
    points = curve.extremes() if curve else []
    steps = [point.step for point in points]
    places = []
    for environment in facts.resumes:
        index = min(bisect.bisect_left(steps, environment["step"]), len(points) - 1)
        if points:
            places.append(points[index]._replace(step=environment["step"], value=math.nan))
    return places


def _color(number: int) -> str:
    return f"run-{number % COLORS}"


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
