import gc
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gemmule.plan import planner
from runs import gemmule, overrides

ROOT = Path(__file__).parents[2]


def test_a_plan_says_whether_it_fits_and_what_it_rests_on(tiny_recipe: Path) -> None:
    ended = gemmule("plan", tiny_recipe, "--device", "4090")
    assert ended.code == 0
    for words in (
        "Fits",
        "53,920",
        "logits and loss",
        "tokens per second",
        "epochs",
        "cost",
        "Assumptions",
        "RTX 4090",
    ):
        assert words in ended.out


def test_json_is_alone_on_standard_output(tiny_recipe: Path) -> None:
    ended = gemmule("plan", tiny_recipe, "--device", "h100", "--gpus", 8, "--set", "parallel.strategy=fsdp", "--json")
    found = json.loads(ended.out)
    assert found["gpus"] == 8
    assert {one["name"].split(" of ")[0] for one in found["exchanges"]} >= {"all-gather", "reduce-scatter"}
    assert found["fits"] is True
    assert "Fits" in ended.err


def test_this_machine_is_measured(tiny_recipe: Path) -> None:
    ended = gemmule("plan", tiny_recipe, "--device", "cpu")
    assert ended.code == 0
    assert "measured on this machine" in ended.out


@pytest.mark.slow
def test_a_recipe_for_the_cpu_is_planned_for_it_where_there_is_a_gpu_too(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "device_at_hand", lambda: planner.find_device("h100"))
    assert json.loads(gemmule("plan", tiny_recipe, "--json").out)["device"] == "cpu"
    elsewhere = gemmule("plan", tiny_recipe, "--set", "train.device=auto", "--json")
    assert json.loads(elsewhere.out)["device"] == "h100"
    assert gc.isenabled()


@pytest.mark.slow
def test_a_thousand_gpus_are_planned_in_seconds() -> None:
    """Five seconds were asked for; counted are seconds of the CPU, which other work on the machine changes little."""
    changes = ["model.size=27b", "parallel.strategy=hsdp", "train.batch_size=1024", "train.micro_batch_size=1"]
    recipe = ROOT / "recipes" / "tinystories-90m.toml"
    command = [sys.executable, "-m", "gemmule", "plan", recipe, "--device", "h100", "--gpus", "1024"]
    command += overrides(*changes)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would_help_and_ends_well(tiny_recipe: Path) -> None:
    changes = ["model.hidden_size=8192", "model.intermediate_size=16384", "model.num_hidden_layers=48"]
    options = [part for change in changes for part in ("--set", change)]
    ended = gemmule("plan", tiny_recipe, "--device", "4090", *options)
    assert ended.code == 0
    assert "Does not fit" in ended.out
    assert "saves" in ended.out
    assert "parallel.strategy=fsdp" in ended.out
    (advice,) = re.findall(r"exceed one device; use (--gpus .*)", ended.out)
    assert "Fits" in gemmule("plan", tiny_recipe, "--device", "4090", *options, *advice.split()).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "h1000"], "did you mean h100"),
        (["--device", "h100", "--gpus", "3"], "must be a multiple of 3 GPUs"),
        (["--device", "cpu", "--gpus", "2"], "needs a GPU"),
        (["--set", "train.stpes=1"], "did you mean train.steps"),
        (["--set", "train.precision=fp16"], "fp16"),
        (["--gpus", "0"], ""),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(tiny_recipe: Path, options: list[str], words: str) -> None:
    ended = gemmule("plan", tiny_recipe, *options)
    assert ended.code == 2
    assert words in ended.err
