from pathlib import Path

import pytest
import torch

from gemmule.errors import RecipeError
from gemmule.model.config import SIZES, Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.settings import Settings, check_recipe, read_recipe, write_recipe
from tiny import tiny_config

# As published: the number of elements in the released text weights.
PUBLISHED = {
    "270m": 268_098_176,
    "1b": 999_885_952,
    "4b": 3_880_263_168,
    "12b": 11_766_034_176,
    "27b": 27_009_346_304,
}
SEED = Gemma3Config(
    vocab_size=32_768,
    hidden_size=512,
    intermediate_size=6144,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=256,
    sliding_window=128,
)


class Recipe(Settings):
    """A recipe with nothing but a model."""

    model: Gemma3Config = Gemma3Config()


def count_parameters(config: Gemma3Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Gemma3(config).parameters())


@pytest.mark.parametrize("size", SIZES)
def test_parameter_count_equals_the_published_one(size: str) -> None:
    assert count_parameters(Gemma3Config.model_validate({"size": size})) == PUBLISHED[size]


def test_seed_shape_has_ninety_million_parameters() -> None:
    assert count_parameters(SEED) == 89_144_832


def test_untied_head_costs_a_second_vocabulary_matrix() -> None:
    tied, untied = (count_parameters(tiny_config(tie_word_embeddings=tied)) for tied in (True, False))
    assert untied - tied == 48 * 24


def test_defaults_are_the_smallest_official_size() -> None:
    assert Gemma3Config() == Gemma3Config.model_validate({"size": "270m"})


def test_size_stands_for_its_numbers_and_keys_beside_it_win() -> None:
    config = check_recipe({"model": {"size": "27b", "vocab_size": 1000, "dropout": 0.1}}, Recipe, "x").model
    assert (config.vocab_size, config.dropout) == (1000, 0.1)
    assert (config.hidden_size, config.query_pre_attn_scalar, config.rope_scaling_factor) == (5376, 168, 8.0)


def test_recipe_with_a_size_repeats(tmp_path: Path) -> None:
    settings = check_recipe({"model": {"size": "1b", "vocab_size": 1000}}, Recipe, "x")
    for given_only in (True, False):
        write_recipe(settings, tmp_path / "recipe.toml", "resolved", given_only=given_only)
        assert read_recipe(tmp_path / "recipe.toml", Recipe) == settings


@pytest.mark.parametrize("size", ["3b", 270, ["1b"], {"of": "1b"}])
def test_unknown_size_names_those_there_are(size: object) -> None:
    with pytest.raises(RecipeError, match=r"model\.size = .*: (must be one of|no such size; there are) 270m, 1b, 4b,"):
        check_recipe({"model": {"size": size}}, Recipe, "x")


def test_every_sixth_layer_is_global() -> None:
    kinds = Gemma3Config.model_validate({"size": "1b"}).layer_kinds
    assert [layer for layer, kind in enumerate(kinds) if kind == "global"] == [5, 11, 17, 23]
    assert len(kinds) == 26
    assert kinds[-1] == "local", "the last layer need not be global"


def test_pattern_decides_which_layers_are_global() -> None:
    assert tiny_config(num_hidden_layers=4, sliding_window_pattern=2).layer_kinds == (
        "local",
        "global",
        "local",
        "global",
    )
    assert set(tiny_config(sliding_window_pattern=1).layer_kinds) == {"global"}
    assert set(tiny_config(sliding_window_pattern=8).layer_kinds) == {"local"}


def test_only_local_layers_have_a_window() -> None:
    assert tiny_config().window("local") == 5
    assert tiny_config().window("global") is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_key_value_heads": 3}, "model.num_key_value_heads = 3: must divide num_attention_heads: [1, 2, 4]"),
        ({"head_dim": 7}, "model.head_dim = 7: must be even, because rotary embeddings turn pairs"),
        ({"hidden_size": 641}, "model.hidden_size = 641: must be a multiple of num_attention_heads (4)"),
        ({"num_hidden_layers": 0}, "model.num_hidden_layers = 0: must be a whole number from 1 to 1,048,576"),
        ({"sliding_window": 0}, "model.sliding_window = 0: must be a whole number at least 1"),
        ({"dropout": 1.0}, "model.dropout = 1.0: must be a number at least 0 and below 1"),
        ({"rope_scaling_factor": 0.5}, "model.rope_scaling_factor = 0.5: must be a number from 1 to 1e+30"),
        ({"num_attn_heads": 4}, "model.num_attn_heads = 4: no such setting; did you mean model.num_attention_heads?"),
    ],
)
def test_impossible_shape_is_explained(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe({"model": change}, Recipe, "x")
    assert f"  {sentence}" in str(caught.value).splitlines()


def test_shapes_of_the_official_sizes_are_possible() -> None:
    for size in SIZES:
        assert list(Gemma3Config.model_validate({"size": size}).problems()) == []
