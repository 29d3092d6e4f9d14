import sys
from pathlib import Path

import pytest

from gemmule.report.tensorboard import TAGS, open_tensorboard
from gemmule.run_folder import read_json_lines

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_runs_metrics_are_shown(tiny_run: Path) -> None:
    lines, shown = read_json_lines(tiny_run / "metrics.jsonl"), scalars(tiny_run / "tensorboard")
    for key, tag in TAGS.items():
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if key in line]
        assert shown.get(tag, []) == expected, tag
    assert "loss/validation" in shown


def test_steps_that_a_killed_run_repeats_are_shown_once(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (2, 3, 4)):
        add = open_tensorboard(tmp_path, pytest.fail)
        for step in steps:
            add({"step": step, "loss": 1.0 / step})
    assert [step for step, _ in scalars(tmp_path)["loss/train"]] == [1, 2, 3, 4]


def test_nothing_is_written_before_the_first_line(tmp_path: Path) -> None:
    open_tensorboard(tmp_path / "tensorboard", pytest.fail)
    assert not (tmp_path / "tensorboard").exists()


def test_without_tensorboard_it_is_said_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    said: list[str] = []
    open_tensorboard(tmp_path / "tensorboard", said.append)({"step": 1, "loss": 1.0})
    assert said == [
        "no TensorBoard events: writing them needs the library tensorboard, which is not installed: "
        "pip install 'gemmule[plots]'"
    ]
    assert not (tmp_path / "tensorboard").exists()
