"""The live display of a training run on a terminal: figures, the curve of the loss, the newest sample."""

import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from math import isfinite
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Lines of the curve and of the sample, and the columns from which on figures stand side by side.
_CURVE_LINES, _SAMPLE_LINES, _WIDE = 4, 4, 72
_REDRAW_SECONDS = 1.0
_BLOCKS, _ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
# Points of the curve that are kept: more than any terminal has columns.
_MAX_POINTS = 2048


def printable(text: str) -> str:
    """Escape what would steer a terminal (control characters, changes of direction); lines and tabs stay."""
    return "".join(_escaped(each) if _steers(each) else each for each in text)


def _steers(character: str) -> bool:
    kind = unicodedata.category(character)
    return (kind == "Cc" and character not in "\n\t") or (kind == "Cf" and "\u202a" <= character <= "\u2069")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class Speed(NamedTuple):
    """What the plan and the machine add to a line of metrics."""

    of_plan: float | None = (
        None  # share of the planned throughput; on a CPU that is what its kernels were measured to do
    )
    mfu: float | None = None  # model FLOPs utilization, of a GPU's published peak
    memory: float | None = None  # peak, in bytes


class TrainingDisplay:
    """Shows the newest figures of a run in the width that there is."""

    def __init__(self) -> None:
        self._line: dict[str, Any] = {}
        self._steps, self._speed, self._sample = 0, Speed(), ""
        self._losses = _Curve()
        self._drawn: list[Segment] = []
        self._drawn_width, self._drawn_at = 0, 0.0

    def update(self, line: Mapping[str, Any], steps: int, speed: Speed) -> None:
        """Take a line of metrics; what it does not say, such as the validation, stays."""
        if "loss" in line:
            self._losses.add(line["step"], line["loss"])
        self._line |= line
        self._steps, self._speed = steps, speed

    def sample(self, text: str) -> None:
        """Take the newest sample."""
        self._sample = printable(text)

    def redraw(self) -> None:
        """Draw it anew the next time."""
        self._drawn_width = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it, again after a second, since it takes milliseconds of a processor that trains."""
        now = time.monotonic()
        if options.max_width != self._drawn_width or now - self._drawn_at > _REDRAW_SECONDS:
            self._drawn, self._drawn_width = list(self._draw(console, options)), options.max_width
            self._drawn_at = now
        yield from self._drawn

    def _draw(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Draw it; no line is wider than the terminal."""
        options = options.update(no_wrap=False, overflow="ellipsis", height=None)
        width = max(20, options.max_width - 1)
        options = options.update(width=width)
        parts: list[RenderableType] = [self._head(width), self._figures(width)]
        parts += [*self._curve(width, options), *self._text(width, console)]
        yield from console.render(Group(*parts), options)

    def _head(self, width: int) -> Table:
        line = self._line
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        left = time_left(line, self._steps) if width >= 60 else time_left(line, self._steps).removesuffix(" left")
        row.add_row(Text(f"step {line['step']:,}/{self._steps:,}"), ProgressBar(self._steps, line["step"]), Text(left))
        return row

    def _figures(self, width: int) -> Table:
        """Put names and figures into one column, or two where there is room."""
        figures = list(figures_of(self._line, self._speed).items())
        columns = 2 if width >= _WIDE else 1
        table = Table.grid(padding=(0, 1))
        for _ in range(columns):
            table.add_column(style="cyan", no_wrap=True)
            table.add_column(no_wrap=columns == 1, min_width=(width // 2 - 16) if columns == 2 else None)
        rows = -(-len(figures) // columns)
        for row in range(rows):
            cells = [figures[row + column * rows] for column in range(columns) if row + column * rows < len(figures)]
            table.add_row(*(Text(part) for cell in cells for part in cell))
        return table

    def _curve(self, width: int, options: ConsoleOptions) -> list[Text]:
        blocks = _ASCII_BLOCKS if options.ascii_only else _BLOCKS
        return [Text(line, style="blue", no_wrap=True) for line in self._losses.lines(width, _CURVE_LINES, blocks)]

    def _text(self, width: int, console: Console) -> list[Text]:
        if not self._sample:
            return []
        wrapped = Text(" ".join(self._sample.split()), style="italic").wrap(console, width - 2, overflow="fold")
        lines = list(wrapped[:_SAMPLE_LINES])
        if len(wrapped) > _SAMPLE_LINES:
            lines[-1].truncate(width - 3, overflow="crop")
            lines[-1].append("…" if console.encoding.startswith("utf") else "~")
        return [Text.assemble("| ", line, no_wrap=True) for line in lines]


class _Curve:
    """A curve of any length in bounded memory: neighbors are averaged where there are too many points."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []

    def add(self, step: int, value: float) -> None:
        if isfinite(value):
            self._points.append((step, value))
        if len(self._points) > _MAX_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            self._points = [(last, (one + other) / 2) for (_, one), (last, other) in pairs]

    def lines(self, width: int, height: int, blocks: str) -> list[str]:
        """Draw it from the first step to the newest, with the highest and the lowest value at its left."""
        if len(self._points) < 2:
            return []
        values = self._resampled(width - 8)
        low, high = min(values), max(values)
        levels = [1 + round((value - low) / (high - low or 1.0) * (8 * height - 1)) for value in values]
        rows = []
        for row in reversed(range(height)):
            label = f"{high:7.3f}" if row == height - 1 else f"{low:7.3f}" if row == 0 else " " * 7
            rows.append(f"{label[:7]} " + "".join(blocks[min(8, max(0, level - 8 * row))] for level in levels))
        return rows

    def _resampled(self, width: int) -> Sequence[float]:
        """Average the points of each of `width` equal parts of the steps; a part without any keeps the last value."""
        first, last = self._points[0][0], self._points[-1][0]
        parts: list[list[float]] = [[] for _ in range(width)]
        for step, value in self._points:
            parts[(step - first) * (width - 1) // max(1, last - first)].append(value)
        values: list[float] = []
        for part in parts:
            values.append(sum(part) / len(part) if part else values[-1])
        return values


def figures_of(line: Mapping[str, Any], speed: Speed) -> dict[str, str]:
    """Return the figures of a run by name, those that are known."""
    unit = "" if "preference_accuracy" in line else " nats/token"
    figures = {"loss": f"{line['loss']:.3f}{unit}" if "loss" in line else "step skipped"}
    if "val_loss" in line:
        figures["validation"] = f"{line['val_loss']:.3f}{unit}"
    if "val_preference_accuracy" in line:
        figures["preferred rightly"] = f"{line['val_preference_accuracy']:.1%} of the pairs"
    if line.get("val_bits_per_byte") is not None:
        figures["validation, bytes"] = f"{line['val_bits_per_byte']:.3f} bits/byte"
    if "val_floor" in line:
        figures["entropy floor"] = f"{line['val_loss'] / line['val_floor'] - 1:+.1%} above {line['val_floor']:.3f}"
    if "tokens" in line:
        figures["tokens"] = f"{line['tokens']:,}"
    if "lr" in line:
        figures["learning rate"] = f"{line['lr']:.2e}"
    figures["speed"] = f"{line['tokens_per_second']:,.0f} tokens/s"
    if speed.of_plan is not None:
        figures["of planned speed"] = f"{speed.of_plan:.0%}"
    if speed.mfu is not None:
        figures["FLOPs utilization"] = f"{speed.mfu:.0%}"
    if speed.memory is not None:
        figures["peak memory"] = f"{speed.memory / 1e9:.2f} GB"
    if line.get("skipped_steps"):
        figures["skipped steps"] = f"{line['skipped_steps']:,}"
    return figures


def time_left(line: Mapping[str, Any], steps: int) -> str:
    """Say how long a run takes from here, as fast as until here."""
    seconds = line["seconds"] / line["step"] * (steps - line["step"])
    return f"{timedelta(seconds=round(seconds))} left"
