"""The recipes that come with Gemmule are right before anybody waits for one."""

import re
from pathlib import Path

import pytest
import torch

from gemmule.model.gemma3 import Gemma3
from gemmule.settings import read_recipe, write_recipe
from gemmule.train.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
SEED = FOLDER / "tinystories-90m-seed.toml"


def parameters(recipe: Recipe) -> int:
    vocabulary = {"vocab_size": recipe.tokenizer.vocab_size}
    with torch.device("meta"):
        return sum(p.numel() for p in Gemma3(recipe.model.replace(**vocabulary)).parameters())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_whole_and_repeats(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, Recipe)
    write_recipe(recipe, tmp_path / "saved.toml", "resolved")
    assert read_recipe(tmp_path / "saved.toml", Recipe) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_begins_with_what_it_is_and_how_to_run_it(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("[")[0]
    assert head.startswith("# ")
    assert f"gemmule train recipes/{path.name}" in head or f"make {path.stem}" in head


@pytest.mark.parametrize("name", ["README.md", "recipes/story.toml", "recipes/tinystories-90m.toml"])
def test_the_size_that_a_page_names_is_that_of_a_recipe(name: str) -> None:
    text = (FOLDER.parent / name).read_text(encoding="utf-8").replace("\n# ", " ").replace("\n", " ")
    claims = re.findall(r"([\d.,]+?)(M| million|) parameters\b", text)
    assert claims
    sizes = [parameters(read_recipe(path, Recipe)) for path in RECIPES]
    exact = {f"{size:,}" for size in sizes}
    rounded = {f"{size / 1e6:.{digits}f}" for size in sizes for digits in (0, 1)}
    for claim, unit in claims:
        assert claim in (rounded if unit else exact), f"{name}: {claim}{unit} parameters"


def test_the_four_runs_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"story", "tinystories-cpu", "tinystories-90m-seed", "tinystories-90m"}


def test_seed_recipe_is_the_seed_documents_table() -> None:
    recipe = read_recipe(SEED, Recipe)
    model, train, optimizer = recipe.model, recipe.train, recipe.optimizer
    assert (train.batch_size, train.context, train.steps, train.validate_every) == (64, 256, 25_000, 500)
    assert recipe.tokenizer.vocab_size == 32_000 + 768
    assert (model.hidden_size, model.num_hidden_layers, model.sliding_window) == (512, 6, 128)
    assert (model.num_attention_heads, model.num_key_value_heads) == (8, 2)
    assert (model.rope_local_base_freq, model.rope_scaling_factor) == (10_000.0, 1.0)
    assert (model.dropout, model.attention_dropout) == (0.1, 0.1)
    assert (optimizer.name, optimizer.learning_rate) == ("adamw", 2.5e-4)
    assert (optimizer.weight_decay, optimizer.beta_1, optimizer.beta_2) == (0.1, 0.9, 0.95)
    assert parameters(recipe) == 89_144_832


def test_best_recipe_spends_the_seeds_budget() -> None:
    budgets = {
        recipe.train.steps * recipe.train.batch_size * recipe.train.context
        for recipe in (read_recipe(path, Recipe) for path in (SEED, FOLDER / "tinystories-90m.toml"))
    }
    assert budgets == {409_600_000}
