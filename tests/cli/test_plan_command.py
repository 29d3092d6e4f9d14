import json
from pathlib import Path

import pytest

from runs import gemmule


def test_a_plan_says_whether_it_fits_and_what_it_rests_on(tiny_recipe: Path) -> None:
    ended = gemmule("plan", tiny_recipe, "--device", "4090")
    assert ended.code == 0
    for words in ("It fits", "86,656", "logits and loss", "tokens a second", "epochs", "cost", "Assumed", "RTX 4090"):
        assert words in ended.out


def test_json_is_alone_on_standard_output(tiny_recipe: Path) -> None:
    ended = gemmule("plan", tiny_recipe, "--device", "h100", "--gpus", 8, "--set", "parallel.strategy=fsdp", "--json")
    found = json.loads(ended.out)
    assert found["gpus"] == 8
    assert {one["name"].split(" of ")[0] for one in found["exchanges"]} >= {"all-gather", "reduce-scatter"}
    assert found["fits"] is True
    assert "It fits" in ended.err


def test_this_machine_is_measured(tiny_recipe: Path) -> None:
    ended = gemmule("plan", tiny_recipe, "--device", "cpu")
    assert ended.code == 0
    assert "measured here" in ended.out


def test_what_does_not_fit_is_said_with_what_would_help_and_ends_well(tiny_recipe: Path) -> None:
    changes = ["model.hidden_size=8192", "model.intermediate_size=16384", "model.num_hidden_layers=48"]
    options = [part for change in changes for part in ("--set", change)]
    ended = gemmule("plan", tiny_recipe, "--device", "4090", *options)
    assert ended.code == 0
    assert "It does not fit" in ended.out
    assert "saves" in ended.out
    assert "parallel.strategy=fsdp" in ended.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "h1000"], "did you mean h100"),
        (["--device", "h100", "--gpus", "3"], "must be a multiple of 3 GPUs"),
        (["--device", "cpu", "--gpus", "2"], "counts GPUs"),
        (["--set", "train.stpes=1"], "did you mean train.steps"),
        (["--set", "train.precision=fp16"], "fp16"),
        (["--gpus", "0"], ""),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(tiny_recipe: Path, options: list[str], words: str) -> None:
    ended = gemmule("plan", tiny_recipe, *options)
    assert ended.code == 2
    assert words in ended.err
