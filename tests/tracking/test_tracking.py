"""Trackers of a run: what they are given, and that one that fails costs a warning and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gemmule.run_folder import RunFolder, read_json_lines
from gemmule.settings import read_recipe
from gemmule.tracking import TRACKERS, Tracker, Tracking, TrackingSettings
from gemmule.train.recipe import Recipe
from gemmule.train.run import run_recipe
from runs import final_weights, timeless_metrics

pytestmark = pytest.mark.usefixtures("without_plots")


class Recorder:
    """Remembers its calls; raises in one of them."""

    def __init__(self, failing: str | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._failing = failing

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self._failing:
            raise ConnectionError("the service is down")

    def start(self, run: RunFolder, step: int) -> None:
        self._note("start", run.path.name, step)

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        self._note("metrics", dict(metrics))

    def log_text(self, name: str, text: str, step: int) -> None:
        self._note("text", name, text, step)

    def log_image(self, name: str, png: Path, step: int) -> None:
        self._note("image", name, png.name, step)

    def stop(self) -> None:
        self._note("stop")

    def finish(self) -> None:
        self._note("finish")


def registered(monkeypatch: pytest.MonkeyPatch, name: str, failing: str | None = None) -> Recorder:
    """Add a tracker to the registry, as a new one would be."""
    tracker = Recorder(failing)
    same: Tracker = tracker
    monkeypatch.setitem(TRACKERS, name, lambda: same)
    return tracker


def sample(_model: Any, _tokenizer: Any, prompts: Any, *_: int) -> list[str]:
    return [f"{prompt} there was" for prompt in prompts]


def test_a_tracker_of_the_registry_is_named_by_the_recipe_and_given_the_whole_run(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = registered(monkeypatch, "ours")
    changes = ['tracking.to=["ours"]', 'train.sample_prompts=["Once", "Then"]', "train.steps=3"]
    run = tmp_path / "run"
    run_recipe(read_recipe(tiny_recipe, Recipe, changes), run, sample=sample)
    calls = tracker.calls
    assert (calls[0], calls[-1]) == (("start", "run", 0), ("finish",))
    assert [call[1] for call in calls if call[0] == "metrics"] == read_json_lines(run / "metrics.jsonl")
    texts = [call[1:] for call in calls if call[0] == "text"]
    assert texts[:2] == [("sample/0", "Once there was", texts[0][2]), ("sample/1", "Then there was", texts[0][2])]
    assert [(text, step) for _, text, step in texts] == [
        (line["text"], line["step"]) for line in read_json_lines(run / "samples.jsonl")
    ]
    assert not (run / "tensorboard").exists(), "the recipe does not name it"


def test_trackers_that_fail_cost_a_warning_each_and_change_nothing(
    tiny_recipe: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = {call: registered(monkeypatch, call, call) for call in ("start", "metrics", "text", "stop", "finish")}
    other = registered(monkeypatch, "other")
    run = tmp_path / "run"
    run_recipe(read_recipe(tiny_recipe, Recipe, [f"tracking.to={[*failing, 'other']}"]), run, sample=sample)
    warnings = [record.getMessage() for record in caplog.records if "tracking" in record.getMessage()]
    assert warnings == [
        f"tracking.to = {name}: cannot be written: the service is down; the run continues without it, and "
        "metrics.jsonl has all"
        for name in failing
    ]
    for name, tracker in failing.items():
        assert sum(call[0] == name for call in tracker.calls) <= 2, "closed once, and not called again"
        assert tracker.calls[-1] == ("finish",)
    assert other.calls[-1] == ("finish",)
    assert final_weights(run) == final_weights(tiny_run)
    assert timeless_metrics(run) == timeless_metrics(tiny_run)


def test_a_tracker_that_does_not_exist_is_refused(tiny_recipe: Path) -> None:
    with pytest.raises(Exception, match=r'tracking.to = "nowhere": no such tracker; there are tensorboard, wandb'):
        read_recipe(tiny_recipe, Recipe, ['tracking.to=["nowhere"]'])


def test_a_resumed_run_may_change_its_trackers(tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    run_recipe(read_recipe(tiny_recipe, Recipe, ["train.steps=2", "tracking.to=[]"]), run)
    tracker = registered(monkeypatch, "ours")
    run_recipe(read_recipe(tiny_recipe, Recipe, ["train.steps=2", 'tracking.to=["ours"]']), run, resume=True)
    assert tracker.calls[0] == ("start", "run", 2)


def test_no_trackers_write_nothing(tmp_path: Path) -> None:
    run = Tracking(TrackingSettings(to=()), RunFolder(tmp_path), 0)
    run.log_metrics({"step": 1, "loss": 1.0})
    run.finish()
    assert list(tmp_path.iterdir()) == []
