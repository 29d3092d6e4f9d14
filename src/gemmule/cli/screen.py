"""What a long command shows: a live bar or display on a terminal, plain lines anywhere else."""

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from gemmule.cli.training_display import Speed, TrainingDisplay, printable, time_left


class _TimeColumn(TimeRemainingColumn):
    """Shows the time that remains; where nobody knows how much there is to do, the time that has passed."""

    def render(self, task: Task) -> Text:
        """Draw the column of a task."""
        return TimeElapsedColumn().render(task) if task.total is None else super().render(task)


class Screen:
    """Shows lines that stay, and on a terminal what is being done now: a bar, or the display of training."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, quiet=quiet)
        self._terminal = self.console.is_terminal
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            _TimeColumn(),
        ]
        self._progress = Progress(*columns, console=self.console)
        self._training: TrainingDisplay | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._live = Live(console=self.console, transient=True, get_renderable=self._present)

    def __enter__(self) -> Self:
        if self._terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            if self._training is not None:  # the last figures stay
                self._training.redraw()
                self._live.transient = False
            self._live.stop()

    def _present(self) -> RenderableType:
        parts: list[RenderableType] = [self._training] if self._training is not None else []
        return Group(*parts, self._progress) if self._task is not None else Group(*parts)

    def print(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(Text(printable(text)))

    def progress(self, label: str, done: int, total: int | None, note: str = "") -> None:
        """Show how far the present work is; without a terminal, name each piece of work once.

        A bar that is full goes away, so that what comes next and has none does not look as if it hung. Without a
        `total` the time that has passed is shown, and `done` where it counts something.
        """
        if label != self._label and not self._terminal:
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

    def training(self, line: dict[str, Any], steps: int, speed: Speed = Speed()) -> None:  # noqa: B008 - immutable
        """Show a line of metrics: on the display each time, as a line that stays where the model was validated."""
        if self._terminal:
            self._clear()
            self._training = self._training or TrainingDisplay()
            self._training.update(line, steps, speed)
        elif self._label != "training":
            self.print("training ...")
        self._label = "training"
        if self._terminal:
            if "val_loss" in line:
                self.console.print(Text(describe_metrics(line, steps)), soft_wrap=False)
            return
        tenth = max(1, steps // 10)
        if "val_loss" in line or line["step"] // tenth != (line["step"] - 1) // tenth:
            speed_and_time = f"{line['tokens_per_second']:,.0f} tokens/s  {time_left(line, steps)}"
            self.print(f"{describe_metrics(line, steps)}  {speed_and_time}")

    def samples(self, texts: Sequence[str]) -> None:
        """Show continued prompts: the first on the display of training, or all as lines that stay."""
        if self._training is not None and texts:
            self._training.sample(texts[0])
            return
        for text in texts:
            self.print("  | " + text.strip().replace("\n", "\n  | "))


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
        self._screen.print(self.format(record))  # with the traceback of what is logged as an exception


def note(sentence: str) -> None:
    """Print a note on standard error, before or without a screen."""
    sys.stderr.write(f"note: {sentence}\n")


def describe_metrics(line: dict[str, Any], steps: int) -> str:
    """Put a line of metrics into words."""
    text = f"step {line['step']:>{len(str(steps))}}/{steps}  "
    text += f"train {line['loss']:.3f}" if "loss" in line else "skipped"
    if "val_loss" in line:
        text += f"  validation {line['val_loss']:.3f}"
        if "val_preference_accuracy" in line:
            text += f", {line['val_preference_accuracy']:.1%} of the pairs preferred rightly"
        else:
            text += " nats/token"
        if line.get("val_bits_per_byte") is not None:
            text += f", {line['val_bits_per_byte']:.3f} bits/byte"
    if "reward" in line:
        text += f"  reward {line['reward']:.3f}"
    if "val_reward" in line:
        text += f"  validation {line['val_reward']:.3f}"
    if "val_floor" in line:
        text += f", {line['val_loss'] / line['val_floor'] - 1:+.1%} above the floor of {line['val_floor']:.3f}"
    return text


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
