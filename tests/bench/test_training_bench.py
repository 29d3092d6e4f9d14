"""The FLOPs per token and the training step of Gemmule's own backend."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gemmule.model.gemma3 import Gemma3
from gemmule.settings import check_recipe
from gemmule.train.recipe import Recipe
from harness.train import DEFAULT, PEERS, flops_per_token, job_of, setup
from harness.trials import Budget
from tiny import some_tokens, tiny_config

BUDGET = Budget(1, 0.0, 1, 1)


def tiny_recipe_of(**train: object) -> Recipe:
    table = {
        "data": {"train": "storybook"},
        "model": tiny_config(vocab_size=512).model_dump(exclude_unset=True),
        "tokenizer": {"vocab_size": 512},
        "train": {"steps": 1, "batch_size": 4, "context": 16, "device": "cpu", "precision": "fp32", **train},
    }
    return check_recipe(table, Recipe, "of the test")


def test_operations_are_those_that_torch_counts() -> None:
    config = tiny_config(num_hidden_layers=3, sliding_window_pattern=1)
    tokens = some_tokens(config, rows=1, length=16)
    with FlopCounterMode(display=False) as counter:
        Gemma3(config)(tokens)
    # Torch counts each score, we those that are visible: a half and half a diagonal of them.
    everywhere = 3 * 4 * config.num_attention_heads * config.head_dim * 16
    visible = everywhere * 17 / 32
    counted = counter.get_total_flops() / 16
    attention_seen = counted - (flops_per_token(config, 16) / 3 - visible)
    # The operations of some kernels are not counted at all.
    assert any(attention_seen == pytest.approx(expected, abs=1) for expected in (everywhere, 0))


def test_a_window_takes_operations_away() -> None:
    wide, narrow = tiny_config(sliding_window=64), tiny_config(sliding_window=4)
    assert flops_per_token(wide, 64) > flops_per_token(narrow, 64) > flops_per_token(narrow, 1)


@pytest.mark.parametrize("changes", [{}, {"muon": True}])
def test_our_step_is_a_step_of_training(changes: dict[str, bool]) -> None:
    step, facts = setup(job_of(tiny_recipe_of(micro_batch_size=2), BUDGET) | changes)
    assert step is not None
    assert facts["parameters"] == sum(
        parameter.numel() for parameter in Gemma3(tiny_config(vocab_size=512)).parameters()
    )
    losses = [step() for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(512), abs=0.2)
    assert len(set(losses)) == 3
    assert facts["threads"] == torch.get_num_threads()


def test_the_job_has_no_dropout_and_the_tokenizers_vocabulary() -> None:
    job = job_of(check_recipe(DEFAULT, Recipe, "the default", ["train.precision=fp32"]), BUDGET)
    assert job["config"]["vocab_size"] == 4096
    changed = tiny_recipe_of()
    job = job_of(changed.replace(model=changed.model.replace(dropout=0.1, attention_dropout=0.1)), BUDGET)
    assert (job["config"]["dropout"], job["config"]["attention_dropout"]) == (0.0, 0.0)


def test_the_default_shape_has_6_76_million_parameters() -> None:
    config = check_recipe(DEFAULT, Recipe, "the default").model.replace(vocab_size=4096)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Gemma3(config).parameters()) == 6_757_376


def test_every_peer_that_is_not_ours_names_its_library() -> None:
    for name, peer in PEERS.items():
        assert (peer.program is None) == (peer.library is None) == name.startswith("gemmule-")
