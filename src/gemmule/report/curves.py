"""loss.png and loss.svg: training and validation loss by step, with the entropy floor if known."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemmule.errors import MissingExtra
from gemmule.files import atomic_write
from gemmule.report.logs import Metrics
from gemmule.run_folder import RunFolder

log = logging.getLogger(__name__)

TRAIN, VALIDATION, FLOOR = "#9db8d9", "#c0392b", "#2e7d32"


def draw_curves(run: RunFolder) -> None:
    """Draw `loss.png` in a run folder from its metrics.jsonl; without matplotlib, log what is missing."""
    lines = run.read_metrics()
    try:
        figure = loss_figure(lines, run.path.name)
    except MissingExtra as error:
        if sum("val_loss" in line for line in lines) == 1:
            log.info(f"no loss.png: {error}")
        return
    _save(figure, run.curves)


def draw_curves_of(metrics: Metrics, run: RunFolder, name: str) -> None:
    """Draw `loss.png` and `loss.svg` of a run, however long or damaged; MissingExtra without matplotlib."""
    figure = loss_figure(list(_lines(metrics)), name)
    for path in (run.curves, run.curves_svg):
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib as mpl

    with atomic_write(path) as temporary, mpl.rc_context({"svg.hashsalt": "gemmule"}):
        kind = path.suffix.removeprefix(".")
        figure.savefig(temporary, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)


def _lines(metrics: Metrics) -> Iterator[dict[str, Any]]:
    """Yield lines of the points that are kept, as metrics.jsonl has them."""
    lines = dict[float, dict[str, Any]]()
    for key in ("loss", "val_loss", "val_bits_per_byte", "val_floor"):
        curve = metrics.curves.get(key)
        for point in curve.extremes() if curve else ():
            lines.setdefault(point.step, {"step": point.step})[key] = point.value
    for step in sorted(lines):
        line = lines[step]
        yield line | ({"val_bits_per_byte": line.get("val_bits_per_byte")} if "val_loss" in line else {})


def loss_figure(lines: list[dict[str, Any]], title: str) -> Any:
    """Return the matplotlib figure of a run's losses."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "plots", "drawing loss.png") from None
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    stepped = [line for line in lines if "loss" in line]  # skipped steps have none
    steps, losses = [line["step"] for line in stepped], [line["loss"] for line in stepped]
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
    finite = [line for line in validated if math.isfinite(line["val_loss"])]
    if finite:
        best = min(finite, key=lambda line: line["val_loss"])
        label = f"best, {best['val_loss']:.3f} at step {best['step']:,.0f}"
        axes.plot([best["step"]], [best["val_loss"]], "*", color=VALIDATION, markersize=11, label=label)
    shown = losses[len(losses) // 20 :] + [line["val_loss"] for line in finite]
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
    bits = last.get("val_bits_per_byte")
    return f"validation, last {last['val_loss']:.3f}" + (f" ({bits:.3f} bits/byte)" if bits is not None else "")


def _smooth(values: list[float]) -> Iterator[float]:
    """Yield a centered moving average over about a thirtieth of the run."""
    side = len(values) // 60
    for index in range(len(values)):
        window = values[max(0, index - side) : index + side + 1]
        yield sum(window) / len(window)
