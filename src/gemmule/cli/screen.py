"""What a long command shows: a live bar on a terminal, plain lines anywhere else."""

import sys
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Screen:
    """Shows lines that stay, and one bar for what is being done now."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._live = self.console.is_terminal
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self._live)
        self._task: TaskID | None = None
        self._label = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False)

    def progress(self, label: str, done: int, total: int | None, note: str = "") -> None:
        """Show how far the present work is; without a terminal, name each piece of work once."""
        if label != self._label:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(label, total=total, note="")
            self._label = label
            if not self._live:
                self.say(f"{label} ...")
        assert self._task is not None
        self._progress.update(
            self._task, completed=done, total=total, note=note or (f"{done:,}" if total is None else "")
        )

    def training(self, line: dict[str, Any], steps: int) -> None:
        """Show a line of metrics: on the bar each time, as a line that stays where the model was validated."""
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        loss = f"loss {line['loss']:.3f}" if "loss" in line else "step skipped"
        self.progress("training", line["step"], steps, f"{loss}  {speed}")
        tenth = max(1, steps // 10)
        if "val_loss" in line or (not self._live and line["step"] // tenth != (line["step"] - 1) // tenth):
            self.say(f"{describe_metrics(line, steps)}  {speed}  {_time_left(line, steps)}")


def describe_metrics(line: dict[str, Any], steps: int) -> str:
    """Put a line of metrics into words."""
    text = f"step {line['step']:>{len(str(steps))}}/{steps}  "
    text += f"train {line['loss']:.3f}" if "loss" in line else "skipped"
    if "val_loss" in line:
        text += f"  validation {line['val_loss']:.3f} nats/token, {line['val_bits_per_byte']:.3f} bits/byte"
    if "val_floor" in line:
        text += f", {line['val_loss'] / line['val_floor'] - 1:+.1%} above the floor of {line['val_floor']:.3f}"
    return text


def _time_left(line: dict[str, Any], steps: int) -> str:
    seconds = line["seconds"] / line["step"] * (steps - line["step"])
    return f"{timedelta(seconds=round(seconds))} left"


def print_json(text: str) -> None:
    """Print the one JSON object of `--json` to standard output."""
    sys.stdout.write(text + "\n")
