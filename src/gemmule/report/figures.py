"""Figures in words: counts, sizes, times, as people read them."""

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from gemmule.report.logs import is_number


def figure(value: float | None, digits: int = 4) -> str:
    """Format a number to so many significant digits, without an exponent where that is readable."""
    if value is None:
        return "unknown"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 1e-3 else f"{value:.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def large(count: float) -> str:
    """Format a count in words where it is large: 1.4 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,.0f}"


def memory_size(count: float) -> str:
    """Format bytes."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Format a time: 3 minutes 2 seconds."""
    if not 0 <= seconds < 1e9:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3g} seconds"
    whole = timedelta(seconds=round(seconds))
    minutes, rest = divmod(whole.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((whole.days, "day"), (hours, "hour"), (minutes, "minute"), (rest if not whole.days else 0, "second"))
    return " ".join(f"{count} {unit}" + ("" if count == 1 else "s") for count, unit in parts if count)


class Measure(NamedTuple):
    """A figure of an evaluation, with its 95 % interval where one is known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """The figure in words."""
        if self.low is None or self.high is None:
            return figure(self.value)
        return f"{figure(self.value)} (95 % interval {figure(self.low)} to {figure(self.high)})"


def measures(result: Mapping[str, Any], prefix: str = "") -> list[Measure]:
    """Return the figures of a result of `gemmule evaluate`, with the intervals that stand beside them or in them."""
    found = []
    beside = result.get("intervals")
    for name, entry in result.items():
        if name in _NO_MEASURES:
            continue
        table = entry if isinstance(entry, Mapping) else {"value": entry}
        value = next((table[key] for key in ("value", "mean", "rate") if is_number(table.get(key))), None)
        if value is None:
            found += measures(table, f"{prefix}{name}: ") if isinstance(entry, Mapping) and not prefix else []
            continue
        interval = table.get("interval") or (beside.get(name) if isinstance(beside, Mapping) else None)
        ends = interval if isinstance(interval, list) and len(interval) == 2 else [None, None]
        low, high = ends if all(map(is_number, ends)) else (None, None)
        found.append(Measure(prefix + name, value, low, high))
    return found


_NO_MEASURES = {
    "items",
    "memorization",  # has a table of its own
    "intervals",
    "settings",
    "version",
    "context",
    "stride",
    "limit",
    "span",
    "searched",
    "dropped",
}
