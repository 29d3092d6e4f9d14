import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gemmule.report.curves import draw_curves, loss_figure
from gemmule.run_folder import RunFolder

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def lines_of(steps: int, floor: float | None = None) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 6.0 / step} for step in range(1, steps + 1)]
    for line in lines[9::10]:
        line |= {"val_loss": line["loss"] + 0.1, "val_bits_per_byte": line["loss"] / 3}
        if floor is not None:
            line["val_floor"] = floor
    return lines


def curves_of(figure: Any) -> dict[str, Any]:
    """The curves by the first word of their labels, and under "" the faint one of every single loss."""
    return {line.get_label().split(",")[0] if line.get_label()[0] != "_" else "": line for line in figure.axes[0].lines}


def test_picture_shows_training_validation_and_floor() -> None:
    lines = lines_of(30, floor=0.15)
    curves = curves_of(loss_figure(lines, "tiny"))
    assert set(curves) == {"", "training", "validation", "best", "entropy floor 0.150"}
    assert list(curves[""].get_xdata()) == list(range(1, 31))
    assert list(curves[""].get_ydata()) == [line["loss"] for line in lines]
    assert list(curves["validation"].get_xdata()) == [10, 20, 30]
    assert list(curves["validation"].get_ydata()) == [lines[step - 1]["val_loss"] for step in (10, 20, 30)]
    last = lines[-1]
    label = f"validation, last {last['val_loss']:.3f} ({last['val_bits_per_byte']:.3f} bits/byte)"
    assert curves["validation"].get_label() == label
    assert set(curves["entropy floor 0.150"].get_ydata()) == {0.15}


def test_without_bits_per_byte_the_loss_alone_is_named() -> None:
    lines = lines_of(30)
    for line in lines[9::10]:
        line["val_bits_per_byte"] = None
    label = curves_of(loss_figure(lines, "tiny"))["validation"].get_label()
    assert label == f"validation, last {lines[-1]['val_loss']:.3f}"


def test_the_best_validation_is_marked_where_the_model_overfits_later() -> None:
    lines = lines_of(40)
    lines[29]["val_loss"], lines[39]["val_loss"] = 5.0, float("nan")
    best = curves_of(loss_figure(lines, "tiny"))["best"]
    assert best.get_label() == f"best, {lines[19]['val_loss']:.3f} at step 20"
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([20], [lines[19]["val_loss"]])


def test_validation_and_floor_are_inside_the_picture() -> None:
    lines = lines_of(30, floor=0.15)
    bottom, top = loss_figure(lines, "tiny").axes[0].get_ylim()
    assert bottom < 0.15
    assert top > max(line["val_loss"] for line in lines if "val_loss" in line)


def smoothed(losses: list[float]) -> list[float]:
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    return list(curves_of(loss_figure(lines, "tiny"))["training"].get_ydata())


def test_smoothing_takes_neighbours_on_both_sides_and_keeps_a_constant() -> None:
    assert smoothed([4.0] + [2.0] * 58 + [8.0]) == pytest.approx([3.0, 8 / 3] + [2.0] * 56 + [4.0, 5.0])
    assert smoothed([3.0] * 60) == pytest.approx([3.0] * 60)


def test_few_losses_are_not_smoothed() -> None:
    assert smoothed([8.0, 6.0]) == [8.0, 6.0]


@pytest.mark.parametrize("steps", [1, 9, 10])
def test_runs_that_have_just_begun_are_drawn(messages: list[str], steps: int, tmp_path: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines_of(steps))
    (tmp_path / "metrics.jsonl").write_text(text)
    draw_curves(RunFolder(tmp_path))
    assert messages == []
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


def test_without_matplotlib_it_is_said_once_what_is_missing(
    messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for steps in (10, 20, 30):
        text = "".join(json.dumps(line) + "\n" for line in lines_of(steps))
        (tmp_path / "metrics.jsonl").write_text(text)
        draw_curves(RunFolder(tmp_path))
    assert messages == [
        "no loss.png: drawing loss.png needs the library matplotlib, which is not installed: "
        "pip install 'gemmule[plots]'"
    ]
    assert not (tmp_path / "loss.png").exists()
