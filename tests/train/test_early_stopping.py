"""A run ends where validation no longer improves (`train.early_stopping`), and its model has the best weights."""

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gemmule.errors import RecipeError
from gemmule.run_folder import read_json_lines
from gemmule.settings import read_recipe
from gemmule.train import objectives
from gemmule.train.objectives import FixedValidation
from gemmule.train.open_run import Extension
from gemmule.train.recipe import Recipe
from gemmule.train.run import Outcome, run_recipe
from gemmule.train.validation import Score
from runs import final_weights, gemmule

pytestmark = pytest.mark.usefixtures("without_plots")

STOPPING = (
    "train.steps=20", "train.validate_every=2", "train.checkpoint_every=2", "train.early_stopping=3",
    'train.final_model="best"', "schedule.name=constant",
)  # fmt: skip


def run(recipe: Path, out: Path, *changes: str, **options: Any) -> Outcome:
    return run_recipe(read_recipe(recipe, Recipe, (*STOPPING, *changes)), out, **options)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Validation losses to come, one for each validation; the last one repeats."""
    coming = [5.0, 4.0, 4.1, 4.0, 4.2, 3.0]
    number = count()

    def validation(*_: Any) -> FixedValidation:
        return FixedValidation(lambda: Score(coming[min(next(number), len(coming) - 1)], 1, None), None)

    monkeypatch.setattr(objectives, "fixed_validation", validation)
    return coming


def test_a_run_stops_after_so_many_validations_without_a_lower_loss_and_keeps_the_best(
    tiny_recipe: Path, tmp_path: Path, losses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gemmule")
    outcome = run(tiny_recipe, tmp_path / "run")
    assert outcome.position.step == 10
    assert outcome.finished
    assert "early stopping after step 10: 3 validations in a row were no better than that of step 4" in caplog.text
    best = tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors"
    assert best.exists()
    straight = run(tiny_recipe, tmp_path / "short", "train.steps=4", 'train.final_model="last"')
    assert straight.position.step == 4
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "short")


def test_a_run_that_stopped_early_is_finished_when_it_is_resumed_and_can_be_extended(
    tiny_recipe: Path, tmp_path: Path, losses: list[float]
) -> None:
    out = tmp_path / "run"
    run(tiny_recipe, out)
    losses[:] = [4.2]  # the last validation is repeated, for no checkpoint has its result
    lines = (out / "metrics.jsonl").read_text()
    resumed = run(tiny_recipe, out, resume=True)
    assert (resumed.position.step, resumed.finished) == (10, True)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == len(lines.splitlines())
    losses[:] = [3.0]
    longer = run(tiny_recipe, out, extend=Extension(steps=4))
    assert longer.position.step == 14
    assert [line["step"] for line in read_json_lines(out / "metrics.jsonl") if "val_loss" in line][-2:] == [12, 14]
    assert longer.recipe.schedule.restart_step == 10


def test_a_kill_on_the_way_changes_nothing(tiny_recipe: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(tiny_recipe, straight, "optimizer.learning_rate=0.5")
    shutil.copytree(straight, stopped)
    last = max((stopped / "checkpoints").iterdir())
    end = int(last.name.removeprefix("step-"))
    shutil.rmtree(last)
    shutil.rmtree(stopped / "model")
    resumed = run(tiny_recipe, stopped, "optimizer.learning_rate=0.5", resume=True)
    assert resumed.position.step == end
    assert final_weights(stopped) == final_weights(straight)


def test_it_needs_a_checkpoint_at_each_validation(tiny_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.checkpoint_every \(3\) must divide train.validate_every \(2\)"):
        run(tiny_recipe, tmp_path / "run", "train.checkpoint_every=3")
    ended = gemmule("train", tiny_recipe, "--set", "train.early_stopping=0", "--out", tmp_path / "run")
    assert ended.code == 2
    assert "train.early_stopping = 0: must be a whole number" in ended.err
