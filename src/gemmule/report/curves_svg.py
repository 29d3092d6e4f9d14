"""Curves as SVG inside a page: whole without JavaScript, colored by the page's classes, every spike kept."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from markupsafe import Markup

HEIGHT = 300
WIDE, NARROW = 720, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 40


class Line(NamedTuple):
    """A line of a chart: its points (x, y) in the order of x, and the classes that color it."""

    classes: str
    points: Sequence[tuple[float, float]]
    markers: bool = False


class Marks(NamedTuple):
    """Places on a chart that are marked by a vertical line, or by a sign at a value."""

    classes: str
    points: Sequence[tuple[float, float | None]]
    meaning: str


def chart_svg(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    bounds: tuple[float, float] | None = None,
    logarithmic: bool = False,
    marks: Sequence[Marks] = (),
    identity: str,
    width: int = WIDE,
) -> "Markup":
    """Draw lines over one pair of axes; `bounds` of y leave out what lies outside, `identity` is unique in a page."""
    from markupsafe import Markup

    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if y > 0 or not logarithmic]
    if not xs or not ys:
        return Markup("")
    low, high = bounds or with_room(min(ys), max(ys), logarithmic)
    plot = _Plot(_spread(min(xs), max(xs)), _spread(low, high, logarithmic), logarithmic, width)
    parts = [*plot.axes(x_label, y_label), f'<clipPath id="{identity}-clip">{plot.frame()}</clipPath>']
    parts.append(f'<g clip-path="url(#{identity}-clip)">')
    for mark in marks:
        parts += [plot.mark(mark, x, y) for x, y in mark.points]
    for line in lines:
        parts.append(plot.polyline(line))
        parts += [plot.dot(line, x, y) for x, y in line.points] if line.markers else []
    template = (
        '<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-desc" class="chart-svg">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>'
    )
    opening = Markup(template).format(width, HEIGHT, *[identity] * 3, title, identity, description)
    return opening + Markup("".join(parts)) + Markup("</g></svg>")


class _Plot:
    """The frame of a chart: places of values, axes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], logarithmic: bool, width: int) -> None:
        self._x, self._y, self._logarithmic, self._width = x, y, logarithmic, width

    def place(self, x: float, y: float) -> str:
        left = _LEFT + (x - self._x[0]) / (self._x[1] - self._x[0]) * (self._width - _LEFT - _RIGHT)
        return f"{left:.1f},{self._height(y):.1f}"

    def _height(self, y: float) -> float:
        bottom, top = (_scaled(each, self._logarithmic) for each in self._y)
        share = (_scaled(y, self._logarithmic) - bottom) / (top - bottom)
        return HEIGHT - _BOTTOM - max(-9.0, min(9.0, share)) * (HEIGHT - _TOP - _BOTTOM)

    def polyline(self, line: Line) -> str:
        points = " ".join(self.place(x, y) for x, y in line.points)
        return f'<polyline class="line {line.classes}" points="{points}"/>'

    def dot(self, line: Line, x: float, y: float) -> str:
        left, top = self.place(x, y).split(",")
        return f'<circle class="dot {line.classes}" cx="{left}" cy="{top}" r="3"/>'

    def mark(self, mark: Marks, x: float, y: float | None) -> str:
        left, top = self.place(x, self._y[0] if y is None else y).split(",")
        meaning = f"<title>{escaped(mark.meaning)}</title>"
        if y is None:
            ends = f'x1="{left}" x2="{left}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"'
            return f'<line class="mark {mark.classes}" {ends}>{meaning}</line>'
        return f'<path class="mark {mark.classes}" d="M{left} {top}l-5 -9h10z">{meaning}</path>'

    def frame(self) -> str:
        size = f'width="{self._width - _LEFT - _RIGHT}" height="{HEIGHT - _TOP - _BOTTOM}"'
        return f'<rect x="{_LEFT}" y="{_TOP}" {size}/>'

    def axes(self, x_label: str, y_label: str) -> list[str]:
        """Return grid, ticks and labels."""
        bottom, middle = HEIGHT - _BOTTOM, (HEIGHT - _BOTTOM + _TOP) / 2
        size = f'width="{self._width - _LEFT - _RIGHT}" height="{bottom - _TOP}"'
        parts = [f'<rect class="frame" x="{_LEFT}" y="{_TOP}" {size}/>']
        for tick in ticks(*self._y, logarithmic=self._logarithmic):
            top = self._height(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{self._width - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
        for tick in ticks(*self._x, count=6 if self._width == WIDE else 4):
            left = self.place(tick, self._y[0]).split(",")[0]
            parts.append(f'<line class="grid" x1="{left}" x2="{left}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(f'<text x="{left}" y="{bottom + 16}" text-anchor="middle">{tick_label(tick)}</text>')
        parts.append(
            f'<text x="{(self._width + _LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escaped(x_label)}</text>'
        )
        turned = f'transform="rotate(-90 13 {middle})"'
        parts.append(f'<text x="13" y="{middle}" text-anchor="middle" {turned}>{escaped(y_label)}</text>')
        return parts


def with_room(low: float, high: float, logarithmic: bool = False) -> tuple[float, float]:
    """Return bounds with a margin; the lower one stays 0 where it is."""
    if logarithmic:
        return low / 1.15, high * 1.15
    room = 0.05 * (high - low) or 0.1
    return (low if low == 0 else low - room), high + room


def escaped(text: str) -> str:
    """Return a text that is no markup; names of runs and metrics are not ours."""
    from markupsafe import escape

    return str(escape(text))


def ticks(low: float, high: float, *, logarithmic: bool = False, count: int = 6) -> list[float]:
    """Return round numbers between two bounds, powers of ten where the axis is logarithmic and long enough."""
    if logarithmic:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        if last - first >= 2:
            every = -(-(last - first) // count)
            return [10.0**power for power in range(first, last + 1, every)]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [each * step for each in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """Return a short label: 25k, 0.01, 1e-05."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9999:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _scaled(value: float, logarithmic: bool) -> float:
    return math.log10(max(value, 1e-300)) if logarithmic else value


def _spread(low: float, high: float, logarithmic: bool = False) -> tuple[float, float]:
    """Return bounds that are apart, so that a single value stands in the middle."""
    if logarithmic:
        return (low, high) if high > low * 1.001 else (low / 2, low * 2)
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high), 1e-12) else (low - 0.5, low + 0.5)
