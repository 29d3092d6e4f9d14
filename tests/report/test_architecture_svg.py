"""The drawing of a model has the model's own figures."""

from xml.etree import ElementTree

import pytest

from gemmule.model.config import Gemma3Config
from gemmule.model.init import meta_model
from gemmule.report.architecture_svg import architecture_svg, parameter_counts, tensor_shapes
from tiny import tiny_config


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(tie_word_embeddings=False), Gemma3Config(size="270m")])
def test_shapes_are_those_of_the_model(config: Gemma3Config) -> None:
    parameters = dict(meta_model(config).named_parameters())
    assert sum(parameter_counts(config).values()) == sum(each.numel() for each in parameters.values())
    ours = sorted(each.shape for each in tensor_shapes(config) for _ in range(each.layers))
    assert ours == sorted(tuple(each.shape) for each in parameters.values())


def test_every_layer_is_drawn_in_the_color_of_its_kind() -> None:
    config = tiny_config()
    drawing = ElementTree.fromstring(str(architecture_svg(config, "a")))
    kinds = [each.get("class") for each in drawing.iter("rect") if each.get("class") in ("local", "global")]
    assert kinds == list(config.layer_kinds)
    text = " ".join(each.text or "" for each in drawing.iter())
    assert "4 query heads, 2 key and value heads of 8" in text
    assert "the last 5 tokens" in text
