import json
import shutil
from pathlib import Path

import pytest

import resume_check
from gemmule.settings import read_recipe
from gemmule.train.checkpoint import checkpoints
from gemmule.train.recipe import Recipe
from harness import resume
from harness.resume import Verdict, shortened


def test_a_recipe_is_shortened_so_that_it_can_be_interrupted(tiny_recipe: Path) -> None:
    long = read_recipe(tiny_recipe, Recipe, ["train.steps=1000", "train.minutes=5"])
    short = shortened(long, 70, 5).train
    assert (short.steps, short.minutes, short.log_every) == (70, None, 1)
    assert (short.checkpoint_every, short.validate_every) == (10, 30)
    assert shortened(long.replace(train=long.train.replace(steps=3)), 70, 5).train.steps == 3
    assert shortened(long, 70, 35).train.checkpoint_every == 2


def test_differences_are_named(tiny_run: Path, tmp_path: Path) -> None:
    same, other = (Path(shutil.copytree(tiny_run, tmp_path / name)) for name in ("same", "other"))
    assert list(resume._differences(tiny_run, same)) == []
    weights = checkpoints(other)[0] / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (other / "samples.jsonl").write_text("")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {"loss": 0.5, "seconds": 0})
    (other / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert list(resume._differences(tiny_run, other)) == [
        "optimizer.safetensors",
        "samples.jsonl",
        "metrics.jsonl: 12 and 11 lines",
        "metrics.jsonl at step 5",
    ]


@pytest.mark.slow
def test_the_command_kills_resumes_and_finds_the_same_run(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume_check.main([str(tiny_recipe), "--kills", "4", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["same"]
    assert verdict["steps"] == 12
    assert len(verdict["kills"]) == 4
    assert verdict["while_saving"] >= 1


def test_a_run_that_is_not_the_same_is_a_failure(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resume, "resume_check", lambda *_: Verdict(12, [3], 0, ["optimizer.safetensors"]))
    assert resume_check.main([str(tiny_recipe)]) == 1
    assert "not equal: optimizer.safetensors differ" in capsys.readouterr().err
