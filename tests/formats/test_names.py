import pytest
import torch

from gemmule.formats.names import HUGGING_FACE, tensor_name_pairs
from gemmule.model.gemma3 import Gemma3
from tiny import tiny_config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 7])
def test_names_cover_every_tensor_of_a_model_exactly_once(layers: int, tied: bool) -> None:
    with torch.device("meta"):
        model = Gemma3(tiny_config(num_hidden_layers=layers, tie_word_embeddings=tied))
    ours = [name for name, _ in tensor_name_pairs(layers, tied)]
    assert sorted(ours) == sorted(model.state_dict())


def test_names_are_one_to_one_in_both_directions() -> None:
    pairs = list(tensor_name_pairs(12, tied=False))
    assert len(pairs) == 12 * 13 + 3
    for side in zip(*pairs, strict=True):
        assert len(set(side)) == len(pairs)


def test_table_numbers_layers_on_both_sides() -> None:
    for ours, theirs in HUGGING_FACE.items():
        assert ours.count("{}") == theirs.count("{}") == ours.startswith("blocks.")
