"""What a long command shows: a live bar on a terminal, plain lines anywhere else."""

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class _TimeColumn(TimeRemainingColumn):
    """Shows the time that remains; where nobody knows how much there is to do, the time that has passed."""

    def render(self, task: Task) -> Text:
        """Draw the column of a task."""
        return TimeElapsedColumn().render(task) if task.total is None else super().render(task)


class Screen:
    """Shows lines that stay, and one bar for what is being done now."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, quiet=quiet)
        self._live = self.console.is_terminal
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            _TimeColumn(),
        ]
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self._live)
        self._task: TaskID | None = None
        self._label = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def print(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False)

    def progress(self, label: str, done: int, total: int | None, note: str = "") -> None:
        """Show how far the present work is; without a terminal, name each piece of work once.

        A bar that is full goes away, so that what comes next and has none does not look as if it hung. Without a
        `total` the time that has passed is shown, and `done` where it counts something.
        """
        if label != self._label and not self._live:
            self.print(f"{label} ...")
        if label != self._label or self._task is None:
            self._clear()
            self._task = self._progress.add_task(label, total=total, note="")
            self._label = label
        counted = f"{done:,}" if total is None and done else ""
        self._progress.update(self._task, completed=done, total=total, note=note or counted)
        if total is not None and done >= total:
            self._clear()

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = None

    def training(self, line: dict[str, Any], steps: int) -> None:
        """Show a line of metrics: on the bar each time, as a line that stays where the model was validated."""
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        loss = f"loss {line['loss']:.3f}" if "loss" in line else "step skipped"
        self.progress("training", line["step"], steps, f"{loss}  {speed}")
        tenth = max(1, steps // 10)
        if "val_loss" in line or (not self._live and line["step"] // tenth != (line["step"] - 1) // tenth):
            self.print(f"{describe_metrics(line, steps)}  {speed}  {_time_left(line, steps)}")


@contextmanager
def logged_to(screen: Screen) -> Iterator[None]:
    """Show the messages that Gemmule logs inside the block on a screen."""
    handler, logger = _ScreenHandler(screen), logging.getLogger("gemmule")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _ScreenHandler(logging.Handler):
    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.print(record.getMessage())


def note(sentence: str) -> None:
    """Tell the user something on standard error, before or without a screen."""
    sys.stderr.write(f"note: {sentence}\n")


def describe_metrics(line: dict[str, Any], steps: int) -> str:
    """Put a line of metrics into words."""
    text = f"step {line['step']:>{len(str(steps))}}/{steps}  "
    text += f"train {line['loss']:.3f}" if "loss" in line else "skipped"
    if "val_loss" in line:
        text += f"  validation {line['val_loss']:.3f} nats/token"
        if line["val_bits_per_byte"] is not None:
            text += f", {line['val_bits_per_byte']:.3f} bits/byte"
    if "val_floor" in line:
        text += f", {line['val_loss'] / line['val_floor'] - 1:+.1%} above the floor of {line['val_floor']:.3f}"
    return text


def _time_left(line: dict[str, Any], steps: int) -> str:
    seconds = line["seconds"] / line["step"] * (steps - line["step"])
    return f"{timedelta(seconds=round(seconds))} left"


def print_json(value: Mapping[str, Any]) -> None:
    """Print the one JSON object of `--json` to standard output.

    NaN and infinity, which JSON does not have, become null; characters that the output's encoding lacks are escaped.
    """
    value = _finite(value)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
