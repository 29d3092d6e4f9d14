import json
import shutil
from pathlib import Path

import pytest

from gemmule.evaluate import resume
from gemmule.evaluate.resume import Verdict, shortened
from gemmule.recipe import read_recipe
from gemmule.train.checkpoint import checkpoints
from gemmule.train.run import Recipe
from runs import gemmule


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
def test_the_command_kills_resumes_and_finds_the_same_run(tiny_recipe: Path) -> None:
    ended = gemmule("resume-check", tiny_recipe, "--kills", 4, "--json")
    assert ended.code == 0, ended.err
    verdict = json.loads(ended.out)
    assert verdict["same"]
    assert verdict["steps"] == 12
    assert len(verdict["kills"]) == 4
    assert verdict["while_saving"] >= 1


def test_a_run_that_is_not_the_same_is_a_failure(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "resume_check", lambda *_: Verdict(12, [3], 0, ["optimizer.safetensors"]))
    ended = gemmule("resume-check", tiny_recipe)
    assert ended.code == 1
    assert "NOT the same run: optimizer.safetensors differ" in ended.err
