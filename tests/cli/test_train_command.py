import json
import math
from pathlib import Path

import pytest

import runs
from gemmule.data.dataset import open_dataset
from gemmule.data.settings import CHAT_SETTINGS
from gemmule.inference.engine import complete
from gemmule.inference.sampling import STORYTELLING
from gemmule.run_folder import read_json_lines
from gemmule.runtime import derive_seed
from gemmule.settings import read_recipe
from gemmule.train.checkpoint import checkpoints, verify_checkpoint
from gemmule.train.recipe import Recipe
from runs import RECIPE, final_weights, gemmule, timeless_metrics

pytestmark = pytest.mark.usefixtures("without_plots")


def test_a_run_folder_holds_what_is_promised(tiny_run: Path) -> None:
    promised = {
        "recipe.toml",
        "metrics.jsonl",
        "loss.png",
        "plan.json",
        "tensorboard",
        "checkpoints",
        "model",
        "samples.jsonl",
        "environment.jsonl",
        "data",
    }
    found = {file.name for file in tiny_run.iterdir()}
    assert promised <= found <= promised | {"evaluation.json", "loss.svg"}, "which evaluate and report add to a run"
    assert [folder.name for folder in checkpoints(tiny_run)] == ["step-00000012", "step-00000009"]
    assert {file.name for file in (tiny_run / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }


def test_metrics_have_the_keys_that_others_rely_on(tiny_run: Path) -> None:
    lines = read_json_lines(tiny_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    always = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    for line in lines:
        validation = {"val_loss", "val_bits_per_byte", "val_perplexity"} if line["step"] in (6, 12) else set()
        assert set(line) == always | validation
    assert lines[0]["loss"] == pytest.approx(math.log(320), abs=0.1)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    last = lines[-1]
    assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    validation = open_dataset(tiny_run / "data").validation
    bits = last["val_loss"] / math.log(2) * (validation.tokens - validation.documents)
    assert last["val_bits_per_byte"] == pytest.approx(bits / validation.bytes)


def test_samples_are_what_the_trained_model_tells(tiny_run: Path) -> None:
    import gemmule as package

    samples = read_json_lines(tiny_run / "samples.jsonl")
    prompts = ["Mia", "The owl saw"]
    assert [(line["step"], line["prompt"]) for line in samples] == [(step, p) for step in (6, 12) for p in prompts]
    told = complete(*package.load(tiny_run), prompts, 12, STORYTELLING, derive_seed(0, "sample"))
    assert [line["text"] for line in samples[2:]] == told


def test_the_checkpoint_knows_where_the_run_stands(tiny_run: Path) -> None:
    position = verify_checkpoint(tiny_run / "checkpoints" / "step-00000012")
    last = read_json_lines(tiny_run / "metrics.jsonl")[-1]
    assert (position.step, position.tokens) == (12, last["tokens"])
    six = read_json_lines(tiny_run / "metrics.jsonl")[5]
    assert (position.best_step, position.best_loss) == (6, six["val_loss"]), "of its own step it is still to come"
    assert position.pending is not None
    assert position.pending.items() <= last.items()
    assert position.seconds == last["seconds"]


def test_curves_are_a_picture(tiny_run: Path) -> None:
    assert (tiny_run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_resolved_recipe_spells_out_every_setting(tiny_run: Path, tiny_recipe: Path) -> None:
    resolved, given = (read_recipe(file, Recipe) for file in (tiny_run / "recipe.toml", tiny_recipe))
    text = (tiny_run / "recipe.toml").read_text()
    unset = {"train.start", "train.minutes", "train.validation_tokens", "train.early_stopping", "tokenizer.path"}
    unset |= {
        f"data.{key}"
        for key in (
            "weights", "max_characters", "keep_matching", "drop_matching", "near_duplicates", "license",
            *CHAT_SETTINGS,
        )
    }  # fmt: skip
    for section in ("data", "tokenizer", "model", "train", "optimizer", "schedule"):
        settings = getattr(resolved, section)
        for key in type(settings).model_fields.keys() - {"size"}:
            assert (f"\n{key} = " in text) != (f"{section}.{key}" in unset), key
    assert resolved.model == given.model.replace(vocab_size=320)
    assert (resolved.train, resolved.optimizer, resolved.data) == (given.train, given.optimizer, given.data)


def test_json_is_the_last_line_of_the_metrics_and_alone_on_standard_output(tiny_recipe: Path, tmp_path: Path) -> None:
    ended = gemmule("train", tiny_recipe, "--set", "train.steps=2", "--out", tmp_path / "run", "--json")
    summary = json.loads(ended.out)
    assert summary.items() >= read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1].items()
    assert summary["model"] == str(tmp_path / "run" / "model")


def test_progress_is_told_with_loss_speed_and_time_left(tiny_training: tuple[Path, str]) -> None:
    err = tiny_training[1]
    for words in ("documents kept", "53,920 parameters", "on cpu in fp32", "training ...", "gemmule generate "):
        assert words in err
    line = next(line for line in err.splitlines() if line.startswith("step  6/12"))
    assert all(words in line for words in ("train ", "validation ", "nats/token", "bits/byte", "tokens/s", "left"))


def test_settings_are_changed_from_the_command_line(tiny_recipe: Path, tmp_path: Path) -> None:
    changes = ["--set", "train.steps=3", "--set", "train.log_every=2", "--set", "optimizer.name=adamw"]
    assert gemmule("train", tiny_recipe, *changes, "--out", tmp_path / "run").code == 0
    resolved = read_recipe(tmp_path / "run" / "recipe.toml", Recipe)
    assert (resolved.train.steps, resolved.train.log_every, resolved.optimizer.name) == (3, 2, "adamw")
    assert [line["step"] for line in timeless_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_without_out_the_run_is_named_after_the_recipe(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gemmule("train", tiny_recipe, "--set", "train.steps=1").code == 0
    assert (tmp_path / "runs" / "tiny" / "model" / "model.safetensors").exists()


def test_a_prepared_folder_trains_like_its_sources(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> None:
    sources = tiny_recipe.parent
    prepared = tmp_path / "prepared"
    options = ["--validation", sources / "valid.txt", "--vocab-size", 320, "--out", prepared]
    assert gemmule("prepare", sources / "train.txt", *options).code == 0
    run = tmp_path / "run"
    assert gemmule("train", tiny_recipe, "--set", f"data.train={prepared}", "--out", run).code == 0
    assert not (run / "data").exists()
    assert final_weights(run) == final_weights(tiny_run)
    assert timeless_metrics(run) == timeless_metrics(tiny_run)


def test_a_loss_that_is_not_finite_ends_with_1_and_a_sentence(tiny_recipe: Path, tmp_path: Path) -> None:
    steps = ["--set", "train.steps=3"]
    changes = [*steps, "--set", "optimizer.learning_rate=1e38", "--set", "optimizer.adamw_learning_rate=1e38"]
    ended = gemmule("train", tiny_recipe, *changes, "--out", tmp_path / "run")
    assert ended.code == 1
    assert "gemmule: step 1: the loss is nan" in ended.err.splitlines()[-1]
    assert "has values that are not finite" in ended.err
    assert "--resume --allow-changes with --set optimizer.learning_rate=..." in ended.err
    lower = [*steps, "--set", "optimizer.learning_rate=0.001", "--set", "optimizer.adamw_learning_rate=0.001"]
    assert gemmule("train", tiny_recipe, *lower, "--out", tmp_path / "run", "--resume", "--allow-changes").code == 0


def test_the_storybook_shows_the_floor_and_judges_the_models_stories(tmp_path: Path) -> None:
    recipe = tmp_path / "book.toml"
    text = RECIPE.replace("steps = 12", "steps = 4").replace("context = 32", "context = 64")
    text = text.replace("num_hidden_layers = 7", "num_hidden_layers = 3")
    recipe.write_text(f'[data]\ntrain = "storybook:200"\nvalidation = "storybook:20"\n{text}', encoding="utf-8")
    ended = gemmule("train", recipe, "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    last = read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 0 < last["val_floor"] < last["val_loss"]
    assert f"above the floor of {last['val_floor']:.3f}" in ended.err
    assert ended.err.count("checker:") == 3
    summary = json.loads(ended.out)
    assert 0 <= summary["possible_stories"] <= summary["good_stories"] <= summary["stories"] == 100


def test_a_gpu_trains_in_bf16_if_there_is_one(tiny_recipe: Path, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA GPU")
    changes = ["--set", "train.device=cuda", "--set", "train.precision=auto"]
    ended = gemmule("train", tiny_recipe, *changes, "--out", tmp_path / "run")
    assert ended.code == 0
    assert "on cuda in bf16" in ended.err
    losses = [line["loss"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_sources_are_mixed_by_their_weights_and_their_epochs_are_told(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.toml"
    text = tiny_recipe.read_text()
    second = runs.write_text(tmp_path / "second.txt", 300, seed=7)
    first = text.split('train = "')[1].split('"')[0]
    mixed = f'train = ["{first}", "{second}"]\nweights = [3, 1]'
    recipe.write_text(text.replace(f'train = "{first}"', mixed).replace("steps = 12", "steps = 2"))
    ended = runs.gemmule("train", recipe, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    dataset = open_dataset(tmp_path / "run" / "data")
    own = [source.tokens for source in dataset.report.sources]
    seen = 2 * 8 * 32
    told = f"{seen * 0.75 / own[0]:.2f} epochs of {first}, {seen * 0.25 / own[1]:.2f} epochs of {second}"
    assert told in ended.err
    ended = runs.gemmule("train", recipe, "--set", "data.weights=[1]", "--out", tmp_path / "other")
    assert (ended.code, "must have one number for each of the 2 SOURCEs" in ended.err) == (2, True)
