import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from gemmule.run_folder import RunFolder, read_json_lines
from gemmule.tracking import Tracking, TrackingSettings
from gemmule.tracking.tensorboard import TAGS

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def events_of(folder: Path) -> Any:
    """Read what TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = events_of(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def tracking(folder: Path, step: int = 0) -> Tracking:
    (folder / "recipe.toml").write_text("[train]\nsteps = 4\n")
    return Tracking(TrackingSettings(), RunFolder(folder), step)


def test_the_metrics_of_a_run_are_shown(tiny_run: Path) -> None:
    lines, shown = read_json_lines(tiny_run / "metrics.jsonl"), scalars(tiny_run / "tensorboard")
    for key, tag in TAGS.items():
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if key in line]
        assert shown.get(tag, []) == expected, tag
    assert "loss/validation" in shown


def test_recipe_samples_and_loss_curves_of_a_run_are_shown(tiny_run: Path) -> None:
    events = events_of(tiny_run / "tensorboard")
    texts = {
        tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    samples = read_json_lines(tiny_run / "samples.jsonl")
    for index, prompt in enumerate(dict.fromkeys(line["prompt"] for line in samples)):
        own = [(line["step"], line["text"]) for line in samples if line["prompt"] == prompt]
        assert texts[f"sample/{index}"] == own
    recipe = (tiny_run / "recipe.toml").read_text()
    assert [text.replace("\n    ", "\n").removeprefix("    ") for _, text in texts["recipe"]] == [recipe]
    (image,) = events.Images("loss")
    assert image.encoded_image_string == (tiny_run / "loss.png").read_bytes()
    assert (image.width, image.height) == (960, 576)


def test_steps_that_a_killed_run_repeats_are_shown_once(tmp_path: Path) -> None:
    for first, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        run = tracking(tmp_path, first)
        for step in steps:
            run.log_metrics({"step": step, "loss": 1.0 / step})
        run.finish()
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["loss/train"]] == [1, 2, 3, 4]


def test_without_tensorboard_a_message_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with caplog.at_level(logging.INFO, "gemmule"):
        run = tracking(tmp_path)
        run.log_metrics({"step": 1, "loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "writing TensorBoard events needs the library tensorboard, which is not installed: pip install 'gemmule[plots]'"
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_events_that_cannot_be_written_cost_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").touch()  # no folder can be made there
    run = tracking(tmp_path)
    for step in (1, 2):
        run.log_metrics({"step": step, "loss": 1.0})
    run.finish()
    (record,) = caplog.records
    assert record.getMessage().startswith("tracking.to = tensorboard: ")
    assert "the run continues without it" in record.getMessage()
