"""Runs that start from the weights of a model (`train.start`)."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import gemmule
import runs
from gemmule.data.settings import DataSettings
from gemmule.errors import ModelError, OutputError, RecipeError
from gemmule.evaluate.text import score_text
from gemmule.run_folder import read_json_lines
from gemmule.runtime import Runtime
from gemmule.settings import read_recipe
from gemmule.train.initial_checks import check_first_step
from gemmule.train.observer import Observer
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import ResolvedRecipe, build
from gemmule.train.run import run_recipe
from gemmule.train.start import open_start
from tiny import lively_model, tiny_config

pytestmark = pytest.mark.usefixtures("without_plots")

# Without a [model] and a [tokenizer], which the model brings.
TRAIN = """
[train]
start = "{start}"
steps = 4
batch_size = 4
context = 32
log_every = 1
validate_every = 4
checkpoint_every = 2
sample_prompts = []
device = "cpu"
precision = "fp32"

[optimizer]
name = "adamw"
learning_rate = 0.001
"""


@pytest.fixture
def recipe(start: Path, tmp_path: Path) -> Path:
    """A recipe that continues training of `start` on another text."""
    train, valid = (runs.write_text(tmp_path / f"{name}.txt", 80, seed) for name, seed in (("new", 5), ("held", 6)))
    file = tmp_path / "continue.toml"
    data = f'[data]\ntrain = "{train}"\nvalidation = "{valid}"\n'
    file.write_text(data + TRAIN.format(start=start), encoding="utf-8")
    return file


def recipe_of(file: Path, *changes: str) -> Recipe:
    return read_recipe(file, Recipe, changes)


def test_weights_shape_and_tokenizer_come_along(recipe: Path, start: Path, tmp_path: Path) -> None:
    still = ("optimizer.learning_rate=1e-12", "train.steps=1", "train.validate_every=1")
    outcome = run_recipe(recipe_of(recipe, *still), tmp_path / "run")
    model, tokenizer = gemmule.load(start)
    assert outcome.dataset.tokenizer.fingerprint == tokenizer.fingerprint
    assert outcome.model is not None
    shape = model.config.replace(dropout=0.0, attention_dropout=0.0)
    assert outcome.model.config == shape
    stored = read_recipe(tmp_path / "run" / "recipe.toml", ResolvedRecipe)
    assert (stored.model, stored.train.start) == (shape, str(start))
    [line] = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    scores = score_text(model, tokenizer, DataSettings(train=(str(tmp_path / "held.txt"),)))
    figures = scores.figures()
    assert line["val_bits_per_byte"] == pytest.approx(figures["bits_per_byte"], abs=1e-5)
    assert line["val_loss"] == pytest.approx(figures["loss"], abs=1e-5)


def test_run_folders_and_gguf_files_start_a_run_as_well(
    recipe: Path, start: Path, tiny_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    gguf = tmp_path / "start.gguf"
    assert runs.gemmule("export", start, "--to", "gguf", "--out", gguf, "--dtype", "f32").code == 0
    for name, source in (("folder", start), ("run", tiny_run), ("gguf", gguf)):
        run_recipe(recipe_of(recipe, f"train.start={source}"), tmp_path / name)
    curves = [runs.timeless_metrics(tmp_path / name) for name in ("folder", "run", "gguf")]
    assert curves[0] == curves[1]
    # llama.cpp's norms are stored as 1 + weight, which rounds.
    assert [line["loss"] for line in curves[2]] == pytest.approx([line["loss"] for line in curves[0]], abs=1e-4)
    assert curves[0][-1]["loss"] < curves[0][0]["loss"]


def test_dropout_is_the_recipe_s_choice(recipe: Path, start: Path, tmp_path: Path) -> None:
    outcome = run_recipe(recipe_of(recipe, "model.dropout=0.1", "train.steps=1"), tmp_path / "run")
    assert outcome.recipe.model == gemmule.load(start)[0].config.replace(dropout=0.1, attention_dropout=0.0)


def test_what_contradicts_the_model_is_refused_at_once(recipe: Path, start: Path, tmp_path: Path) -> None:
    changes = ("model.hidden_size=64", "model.sliding_window=8", "tokenizer.vocab_size=512")
    with pytest.raises(RecipeError) as refused:
        run_recipe(recipe_of(recipe, *changes), tmp_path / "run")
    assert str(refused.value) == (
        f"train.start = {start} decides the shape and the tokenizer; leave these settings out\n"
        "  model.hidden_size = 64: the model has 32\n"
        "  tokenizer.vocab_size = 512: the model has 320"
    )
    with pytest.raises(RecipeError, match=r"tokenizer\.path = .*: the model brings its tokenizer"):
        run_recipe(recipe_of(recipe, f"tokenizer.path={start}"), tmp_path / "run")
    with pytest.raises(RecipeError, match="damp_branches = true: is for first weights"):
        recipe_of(recipe, "train.damp_branches=true")


def test_a_model_that_is_none_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no/such: no such folder"):
        run_recipe(recipe_of(recipe, "train.start=no/such"), tmp_path / "run")


def test_a_dataset_of_another_tokenizer_is_refused(recipe: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    assert runs.gemmule("prepare", tmp_path / "new.txt", "--vocab-size", 300, "--out", dataset).code == 0
    changes = (f"data.train={dataset}", "data.validation=none")
    with pytest.raises(RecipeError, match=r"was prepared with another tokenizer than that of train\.start"):
        run_recipe(recipe_of(recipe, *changes), tmp_path / "run")


class Stop(Observer):
    """Asks the run to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_metrics(self, metrics: dict[str, Any], _steps: int) -> None:
        if metrics["step"] == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_resumed_run_is_the_same_and_needs_the_model_no_more(recipe: Path, start: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_recipe(recipe_of(recipe), straight)
    assert run_recipe(recipe_of(recipe), stopped, observer=Stop(2)).position.step < 4
    elsewhere = start.rename(start.with_name("elsewhere"))
    try:
        assert run_recipe(recipe_of(recipe), stopped, resume=True).position.step == 4
    finally:
        elsewhere.rename(start)
    assert runs.final_weights(stopped) == runs.final_weights(straight)
    assert runs.timeless_metrics(stopped) == runs.timeless_metrics(straight)


def test_a_run_that_started_from_another_model_is_not_resumed(recipe: Path, tmp_path: Path) -> None:
    run_recipe(recipe_of(recipe), tmp_path / "run")
    with pytest.raises(OutputError, match=r"train\.start is 'other', was "):
        run_recipe(recipe_of(recipe, "train.start=other"), tmp_path / "run", resume=True, allow_changes=True)


@pytest.mark.parametrize(("loss", "warned"), [(0.5, False), (1.5, True), (float("nan"), True)])
def test_a_model_that_knows_nothing_of_the_text_is_warned_of(
    caplog: pytest.LogCaptureFixture, loss: float, warned: bool
) -> None:
    model = lively_model(tiny_config())
    targets = torch.tensor([[1, 2, 1, 2]])  # whose frequencies cost ln 2
    model(targets).float().square().mean().backward()
    check_first_step(model, loss, targets, pretrained=True)
    assert ("the frequencies of these tokens alone would cost 0.69" in caplog.text) == warned


def test_a_deeper_model_begins_as_the_one_it_starts_from_and_its_new_layers_learn(
    recipe: Path, start: Path, tmp_path: Path
) -> None:
    shallow, _ = gemmule.load(start)
    layers = shallow.config.num_hidden_layers + 3
    deeper = recipe_of(recipe, f"model.num_hidden_layers={layers}")
    opened = open_start(deeper)
    assert opened is not None
    adopted = opened.adopt(deeper)
    assert adopted.model == shallow.config.replace(num_hidden_layers=layers, dropout=0.0, attention_dropout=0.0)
    state = build(adopted, Runtime(torch.device("cpu")), opened)
    tokens = torch.arange(2, 42)[None] % shallow.config.vocab_size
    with torch.no_grad():
        first, before = state.parallel.model.eval()(tokens), shallow.eval()(tokens)
    assert torch.equal(first, before), "a layer whose post-norms have gain 0 is the identity, to the last bit"
    outcome = run_recipe(deeper, tmp_path / "run")
    assert outcome.model is not None
    new = [f"blocks.{layer}.post_mlp_norm.weight" for layer in range(shallow.config.num_hidden_layers, layers)]
    weights = dict(outcome.model.named_parameters())
    assert all(bool((weights[name] != -1).any()) for name in new)
    resumed = run_recipe(deeper, tmp_path / "run", resume=True)
    assert resumed.position.step == outcome.position.step
    stored = read_recipe(tmp_path / "run" / "recipe.toml", ResolvedRecipe)
    assert stored.model.num_hidden_layers == layers


def test_fewer_layers_than_the_model_has_are_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.num_hidden_layers = 1: the model has"):
        run_recipe(recipe_of(recipe, "model.num_hidden_layers=1"), tmp_path / "run")
