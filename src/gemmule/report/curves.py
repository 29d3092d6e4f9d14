"""loss.png: training and validation loss against steps, and the floor where it is known."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemmule.errors import MissingExtra
from gemmule.files import written_aside
from gemmule.train.metrics import read_json_lines

TRAIN, VALIDATION, FLOOR = "#9db8d9", "#c0392b", "#2e7d32"


def draw_curves(run: Path, say: Callable[[str], None]) -> None:
    """Draw `loss.png` in a run folder from its metrics.jsonl; without matplotlib, say what is missing."""
    lines = read_json_lines(run / "metrics.jsonl")
    try:
        figure = loss_figure(lines, run.name)
    except MissingExtra as error:
        if sum("val_loss" in line for line in lines) == 1:
            say(f"no loss.png: {error}")
        return
    with written_aside(run / "loss.png") as path:
        figure.savefig(path, format="png", dpi=120)


def loss_figure(lines: list[dict[str, Any]], title: str) -> Any:
    """Return the matplotlib figure of a run's losses."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "plots", "drawing loss.png") from None
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    learned = [line for line in lines if "loss" in line]  # steps that were skipped have none
    steps, losses = [line["step"] for line in learned], [line["loss"] for line in learned]
    validated = [line for line in lines if "val_loss" in line]
    axes.plot(steps, losses, color=TRAIN, alpha=0.45, linewidth=0.8)
    axes.plot(steps, list(_smooth(losses)), color="#1f4e8c", linewidth=1.5, label="training")
    axes.plot(
        [line["step"] for line in validated],
        [line["val_loss"] for line in validated],
        color=VALIDATION,
        marker="o",
        markersize=3.5,
        linewidth=1.5,
        label=_describe(validated),
    )
    shown = losses[len(losses) // 20 :] + [line["val_loss"] for line in validated]
    floor = validated[-1].get("val_floor") if validated else None
    if floor is not None:
        axes.axhline(floor, color=FLOOR, linestyle="--", linewidth=1.2, label=f"entropy floor {floor:.3f}")
        shown.append(floor)
    if shown:
        room = 0.06 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _describe(validated: list[dict[str, Any]]) -> str:
    if not validated:
        return "validation"
    last = validated[-1]
    return f"validation, at last {last['val_loss']:.3f} ({last['val_bits_per_byte']:.3f} bits/byte)"


def _smooth(values: list[float]) -> Iterator[float]:
    """Yield the mean of each value and its neighbours, about a thirtieth of the run."""
    side = max(1, len(values) // 60)
    for place in range(len(values)):
        near = values[max(0, place - side) : place + side + 1]
        yield sum(near) / len(near)
