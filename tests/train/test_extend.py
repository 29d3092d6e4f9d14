"""A finished run trains longer (`--extend`), with a schedule that begins anew."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from gemmule.errors import OutputError, RecipeError
from gemmule.run_folder import read_json_lines
from gemmule.settings import read_recipe
from gemmule.train import loop
from gemmule.train.open_run import Extension
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import ResolvedRecipe
from gemmule.train.run import Outcome, run_recipe
from gemmule.train.schedule import ScheduleSettings, lr_scale
from runs import final_weights, gemmule, timeless_metrics

pytestmark = pytest.mark.usefixtures("without_plots")


def run(recipe: Path, out: Path, *changes: str, **options: Any) -> Outcome:
    short = ("train.steps=6", "model.num_hidden_layers=3")
    return run_recipe(read_recipe(recipe, Recipe, (*short, *changes)), out, **options)


@pytest.fixture(scope="module")
def finished(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, to be copied and extended."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(tiny_recipe, out)
    return out


def rates(out: Path) -> list[float]:
    return [line["lr"] for line in read_json_lines(out / "metrics.jsonl")]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_a_restart_ends_one_schedule_and_begins_another(name: str) -> None:
    once = ScheduleSettings(name=name, warmup_share=0.2, final=0.05)
    twice = once.replace(restart_step=50)
    assert [lr_scale(step, 80, twice) for step in range(80)] == [
        *(lr_scale(step, 50, once) for step in range(50)),
        *(lr_scale(step, 30, once) for step in range(30)),
    ]


def test_a_finished_run_is_extended(
    tiny_recipe: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    before = timeless_metrics(out)
    caplog.set_level("INFO", "gemmule")
    assert run(tiny_recipe, out, extend=Extension(steps=3)).position.step == 9
    assert "extending the run by 3 steps: from step 6 on the learning rate warms up and decays anew" in caplog.text
    assert timeless_metrics(out)[:6] == before
    scale = ScheduleSettings(restart_step=6)
    assert rates(out) == pytest.approx([0.01 * lr_scale(step, 9, scale) for step in range(9)])
    stored = read_recipe(out / "recipe.toml", ResolvedRecipe)
    assert (stored.train.steps, stored.schedule.restart_step) == (9, 6)
    assert read_recipe(out / "recipe-until-00000006.toml", ResolvedRecipe).train.steps == 6
    # A run that was extended is finished: resuming does nothing, extending goes on from there.
    assert run(tiny_recipe, out, resume=True).position.step == 9
    assert run(tiny_recipe, out, extend=Extension(steps=2)).position.step == 11
    assert len(rates(out)) == 11


def test_an_extension_that_was_interrupted_is_resumed_exactly(
    tiny_recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = (shutil.copytree(finished, tmp_path / name) for name in ("straight", "stopped"))
    run(tiny_recipe, straight, extend=Extension(steps=4))

    def scale(step: int, steps: int, settings: ScheduleSettings) -> float:
        if step == 8:
            raise ConnectionError
        return lr_scale(step, steps, settings)

    monkeypatch.setattr(loop, "lr_scale", scale)
    with pytest.raises(ConnectionError):
        run(tiny_recipe, stopped, extend=Extension(steps=4))
    monkeypatch.undo()
    assert run(tiny_recipe, stopped, resume=True).position.step == 10
    assert final_weights(stopped) == final_weights(straight)
    assert timeless_metrics(stopped) == timeless_metrics(straight)


def test_an_extension_may_have_another_rate(tiny_recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    changes = ("optimizer.learning_rate=0.002", "schedule.name=constant", "schedule.warmup_share=0")
    run(tiny_recipe, out, *changes, extend=Extension(steps=2))
    assert rates(out)[6:] == pytest.approx([0.002, 0.002])
    with pytest.raises(OutputError, match=r"model\.hidden_size is 64, was 32"):
        run(tiny_recipe, out, "model.hidden_size=64", extend=Extension(steps=2))


def test_minutes_are_turned_into_steps(tiny_recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    done = run(tiny_recipe, out, extend=Extension(minutes=1e-6)).position.step
    assert done == 7
    assert read_recipe(out / "recipe.toml", ResolvedRecipe).train.minutes is None


def test_what_is_no_run_is_not_extended(tiny_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no run to extend yet; train it without --extend first"):
        run(tiny_recipe, tmp_path / "run", extend=Extension(steps=2))
    with pytest.raises(RecipeError, match=r"schedule\.restart_step = 6: must be before train\.steps \(6\)"):
        run(tiny_recipe, tmp_path / "run", "schedule.restart_step=6")


@pytest.mark.parametrize("value", ["", "0", "-5", "2.5", "ten", "5h", "1e3", "0m", "99999999999", "m"])
def test_a_length_that_is_none_is_refused(tiny_recipe: Path, tmp_path: Path, value: str) -> None:
    ended = gemmule("train", tiny_recipe, "--out", tmp_path / "run", f"--extend={value}")
    assert ended.code == 2
    assert f"--extend {value}: write a number of steps, such as 500, or of minutes, such as 10m" in ended.err
    assert not (tmp_path / "run").exists()


IN_WORDS = pytest.param("0.000001 minutes", 13, marks=pytest.mark.slow)  # the same run as for "m"


@pytest.mark.parametrize(("value", "steps"), [("2", 14), ("0.000001m", 13), IN_WORDS])
def test_the_command_extends(tiny_run: Path, tiny_recipe: Path, tmp_path: Path, value: str, steps: int) -> None:
    out = shutil.copytree(tiny_run, tmp_path / "run")
    assert gemmule("train", tiny_recipe, "--out", out, "--extend", value).code == 0
    assert read_json_lines(out / "metrics.jsonl")[-1]["step"] == steps
