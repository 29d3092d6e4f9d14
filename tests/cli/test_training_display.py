"""The live display of training: whole at every width, and whatever the model says is text."""

import io
import math
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from gemmule.cli.training_display import Speed, TrainingDisplay

STEPS = 200
VALIDATED: dict[str, Any] = {"val_loss": 2.31, "val_bits_per_byte": 0.912, "val_floor": 2.2}
SPEED = Speed(of_plan=0.97, mfu=0.41, memory=1.21e9)


def display(sample: str = "", steps: int = STEPS, **more: Any) -> TrainingDisplay:
    """A run at a fifth of its steps, whose loss falls from 7 to 2."""
    shown = TrainingDisplay()
    for step in range(1, steps + 1):
        loss = 2 + 5 * math.exp(-step / 20)
        line = {"step": step, "tokens": step * 4096, "loss": loss, "lr": 0.00312, "tokens_per_second": 12345.6}
        shown.update(line | {"seconds": step * 0.5} | more, 5 * steps, SPEED)
    shown.sample(sample)
    return shown


def lines(shown: TrainingDisplay, width: int, encoding: str = "utf-8") -> list[str]:
    """Return the lines of a recorded terminal."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, force_terminal=True, record=True, color_system=None, soft_wrap=True)
    console.print(shown)
    return [line.rstrip() for line in console.export_text(styles=False).splitlines()]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_every_width_shows_every_figure_whole(width: int) -> None:
    shown = lines(display("Once upon a time, there was a little boy. " * 20, **VALIDATED), width)
    assert all(cell_len(line) < width for line in shown)
    figures = [
        "step 200/1,000", "loss", "2.000 nats/token", "2.310 nats/token", "0.912 bits/byte", "+5.0% above 2.200",
        "819,200", "3.12e-03", "12,346 tokens/s", "of planned speed  97%",
        "FLOPs utilization 41%", "1.21 GB", "0:06:40",
    ]  # fmt: skip
    for figure in figures:
        assert any(figure in line for line in shown), figure
    samples = [line for line in shown if line.startswith("|")]
    assert len(samples) == 4
    assert samples[-1].endswith("…")
    assert len(shown) <= 20, "a terminal has 24 lines"


def test_the_curve_falls_as_the_loss_does() -> None:
    curve = [line for line in lines(display(), 80) if set(line) & set("▁▂▃▄▅▆▇█")]
    heights = [sum(" ▁▂▃▄▅▆▇█".index(row[column : column + 1] or " ") for row in curve) for column in range(8, 79)]
    assert len(curve) == 4
    assert heights == sorted(heights, reverse=True)
    assert (heights[0], heights[-1]) == (32, 1)
    assert curve[0].split()[0] == f"{max_of_first_column():.3f}"


def max_of_first_column() -> float:
    """The first column of 72 stands for the first 200 / 71 steps."""
    first = [2 + 5 * math.exp(-step / 20) for step in range(1, STEPS + 1) if (step - 1) * 71 // (STEPS - 1) == 0]
    return sum(first) / len(first)


def test_a_long_run_keeps_a_bounded_curve() -> None:
    shown = display(steps=10_000)
    assert len(shown._losses._points) <= 2048
    assert shown._losses._points[-1][0] == 10_000


def test_text_of_a_model_is_neither_markup_nor_control() -> None:
    shown = "\n".join(lines(display("[bold]Leo[/bold] \x1b[2J\x07 \u202egnp [/] :smile: 住在塔里"), 80))
    assert r"| [bold]Leo[/bold] \x1b[2J\x07 \u202egnp [/] :smile: 住在塔里" in shown
    assert "\x1b" not in shown


def test_a_terminal_without_unicode_gets_another_curve() -> None:
    shown = lines(display("word " * 200), 60, encoding="ascii")
    text = "\n".join(line for line in shown if not line.startswith("step"))
    assert text.isascii()
    assert "#" in text
    assert shown[-1].endswith("~")


def test_what_is_not_known_is_left_out_and_nan_is_no_point() -> None:
    shown = TrainingDisplay()
    line = {"step": 1, "loss": math.nan, "tokens_per_second": 1.0, "seconds": 1.0}
    shown.update(line, 10, Speed())
    assert lines(shown, 60)[1:] == ["loss  nan nats/token", "speed 1 tokens/s"]
    shown.update({"step": 2, "tokens_per_second": 1.0, "seconds": 2.0, "skipped_steps": 3}, 10, Speed())
    assert "skipped steps 3" not in lines(shown, 60), "drawn once per second"
    shown.redraw()
    assert "skipped steps 3" in lines(shown, 60)
