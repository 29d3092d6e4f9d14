"""The plan of a run that trains an adapter: frozen weights have no gradients and no optimizer state."""

import pytest

from gemmule.model.config import Gemma3Config
from gemmule.model.init import meta_model
from gemmule.model.lora import LoRA, add_lora
from gemmule.plan.memory import count_parameters, weights_of
from gemmule.plan.planner import Planner, planner_of
from gemmule.settings import check_recipe
from gemmule.train.recipe import Recipe

CONFIG = Gemma3Config.model_validate({"size": "270m"})


def planner(*changes: str) -> Planner:
    table = {
        "data": {"train": "a.txt"},
        "model": {"size": "270m", "vocab_size": 262_144},
        "train": {"steps": 1, "batch_size": 8, "context": 512, "precision": "bf16", "start": "m"},
    }
    return planner_of(check_recipe(table, Recipe, "x", changes), "h100")


def test_weights_gradients_and_moments_are_those_of_what_learns() -> None:
    lora = LoRA(16, 32.0, rows=(0, 1))
    model = meta_model(CONFIG)
    add_lora(model, lora)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = count_parameters(CONFIG).total
    assert weights_of(CONFIG) == (4 * total, total)
    assert weights_of(CONFIG, lora) == (4 * total + 4 * learning, learning)
    assert weights_of(CONFIG, lora, half_base=True) == (2 * total + 4 * learning, learning)


def test_an_adapter_needs_less_memory_than_all_weights() -> None:
    whole, rows, none = (
        planner(*changes).memory(8) for changes in ((), ("lora.rank=16",), ("lora.rank=16", "lora.token_rows=none"))
    )
    learning = planner("lora.rank=16", "lora.token_rows=none").adapted
    assert learning is not None
    assert none.classes["optimizer"] == 8 * learning.learning
    assert none.classes["weights"] == learning.bytes
    assert whole.classes["optimizer"] == 8 * count_parameters(CONFIG).total
    assert none.total < rows.total < whole.total
    # The gradient of the whole vocabulary is made where some of its rows learn, and no other one of its size.
    vocabulary = 4 * CONFIG.vocab_size * CONFIG.hidden_size
    assert rows.total - none.total > vocabulary


@pytest.mark.parametrize("change", ["lora.dora=true", "parallel.activation_checkpointing=full", "train.compile=true"])
def test_every_kind_of_step_can_be_planned(change: str) -> None:
    assert planner("lora.rank=4", change).plan(search=False).fits
    assert planner("lora.rank=4", "train.micro_batch_size=2").memory(2).total > 0
