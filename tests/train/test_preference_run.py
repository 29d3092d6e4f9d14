"""Runs on preferences: the reference is scored once, the margin grows, and a resumed run is the same."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runs
from gemmule.data.dataset import open_dataset
from gemmule.errors import CheckpointError, DatasetError, RecipeError
from gemmule.run_folder import RunFolder, read_json_lines
from gemmule.runtime import Runtime
from gemmule.settings import read_recipe
from gemmule.train.opening import load_with_path
from gemmule.train.recipe import Recipe
from gemmule.train.reference import log_probabilities
from gemmule.train.run import run_recipe

pytestmark = pytest.mark.usefixtures("without_plots")

TRAIN = """
[data]
kind = "preferences"
train = "{train}"
validation = "{validation}"

[train]
start = "{start}"
steps = 6
batch_size = 2
context = 128
log_every = 1
validate_every = 3
checkpoint_every = 3
sample_prompts = []
device = "cpu"
precision = "fp32"

[optimizer]
name = "adamw"
learning_rate = 0.003

[schedule]
warmup_share = 0.0
"""
THINGS = ("kite", "ball", "drum", "boat", "cake", "lamp")


def write_pairs(path: Path, count: int, first: int = 0) -> Path:
    """Pairs in which the reply with a full stop is the chosen one."""
    rows = [
        {
            "prompt": f"What is number {number}?",
            "chosen": f"It is a {THINGS[number % 6]}.",
            "rejected": f"It is a {THINGS[number % 6]}!!",
        }
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(start: Path, tmp_path: Path) -> Path:
    train, held_out = write_pairs(tmp_path / "train.jsonl", 24), write_pairs(tmp_path / "held.jsonl", 6, 100)
    recipe = tmp_path / "prefer.toml"
    recipe.write_text(TRAIN.format(train=train, validation=held_out, start=start), encoding="utf-8")
    return recipe


def recipe_of(file: Path, *changes: str) -> Recipe:
    return read_recipe(file, Recipe, changes)


def metrics(run: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(run / "metrics.jsonl"))


def test_the_first_step_guesses_and_later_ones_prefer(file: Path, tmp_path: Path) -> None:
    outcome = run_recipe(recipe_of(file), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the policy is the reference still"
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["val_preference_accuracy"] > 0.8
    assert lines[-1]["val_loss"] < math.log(2)
    assert outcome.model is not None
    stored = (tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8")
    assert "[preferences]" in stored


def test_stored_figures_of_the_reference_are_those_of_the_model(file: Path, start: Path, tmp_path: Path) -> None:
    run_recipe(recipe_of(file), tmp_path / "run")
    dataset, folder = open_dataset(RunFolder(tmp_path / "run").data), RunFolder(tmp_path / "run").data
    [stored] = [np.load(each) for each in sorted(folder.glob("reference-*-train.npy"))]
    model, _, _ = load_with_path(start)
    alone = log_probabilities(model, dataset.train, Runtime(model.embedding.weight.device), lambda *_: None)
    np.testing.assert_allclose(stored, alone, rtol=1e-6, atol=1e-6)
    assert dataset.train.documents == 2 * 24


@pytest.mark.parametrize("loss", ["ipo", "simpo"])
def test_other_losses_run(file: Path, tmp_path: Path, loss: str) -> None:
    run_recipe(recipe_of(file, f"preferences.loss={loss}", "train.steps=4"), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert bool(list((tmp_path / "run" / "data").glob("reference-*"))) == (loss == "ipo")


def test_another_reference_is_refused_when_a_run_is_resumed(file: Path, start: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(start, tmp_path / "copy")
    recipe = recipe_of(file, f"train.start={copy}")
    run_recipe(recipe, tmp_path / "run")
    shutil.rmtree(copy)
    shutil.copytree(start.parent / "model", copy)
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="reference"):
        run_recipe(recipe, tmp_path / "run", resume=True)


def test_a_damaged_file_of_the_reference_is_named(file: Path, tmp_path: Path) -> None:
    run_recipe(recipe_of(file), tmp_path / "run")
    [stored] = (tmp_path / "run" / "data").glob("reference-*-train.npy")
    stored.write_bytes(stored.read_bytes()[:-7])
    with pytest.raises(DatasetError, match=str(stored)):
        run_recipe(recipe_of(file), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.start=none", "train.start: name the MODEL that preferences are taught to"),
        ("model.dropout=0.1", "model.dropout"),
        ("train.context=8", "none of the"),
    ],
)
def test_what_cannot_be_taught_is_refused(file: Path, tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises((RecipeError, DatasetError), match=words):
        run_recipe(recipe_of(file, change), tmp_path / "run")


def test_a_resumed_run_is_the_same(file: Path, tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_recipe(recipe_of(file), straight)
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    shutil.rmtree(cut / "model")
    run_recipe(recipe_of(file), cut, resume=True)
    assert runs.final_weights(cut) == runs.final_weights(straight)
    assert runs.timeless_metrics(cut) == runs.timeless_metrics(straight)


@pytest.mark.slow
def test_twenty_kills_change_nothing(file: Path, tmp_path: Path) -> None:
    straight, run = tmp_path / "straight", tmp_path / "killed"
    assert runs.kill_until_done(file, run, straight, tmp_path / "log.txt") > 3
    assert runs.final_weights(run) == runs.final_weights(straight)
    assert runs.timeless_metrics(run) == runs.timeless_metrics(straight)
