"""Peers of `benchmarks/train.py` do the same work: parameter counts, initial loss, updates of the weights."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from gemmule.settings import check_recipe
from gemmule.train.recipe import Recipe
from harness.backends import gemmule_backend, peer_backend, run_backend
from harness.train import PEERS, job_of
from harness.trials import Budget
from tiny import tiny_config

pytestmark = pytest.mark.slow

LITGPT = os.environ.get("LITGPT_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    shape = tiny_config(vocab_size=512, rope_scaling_factor=1.0).model_dump(exclude_unset=True)
    train = {"steps": 1, "batch_size": 4, "micro_batch_size": 2, "context": 32, "device": "cpu", "precision": "bf16"}
    table = {"data": {"train": "storybook"}, "model": shape, "tokenizer": {"vocab_size": 512}, "train": train}
    return job_of(check_recipe(table, Recipe, "of the test"), Budget(1, 0.0, 1, 3))


@pytest.fixture(scope="module")
def ours(job: dict[str, Any]) -> dict[str, Any]:
    return run_backend(gemmule_backend("gemmule", "train", job))


@pytest.mark.parametrize("name", ["transformers", "litgpt"])
def test_a_peer_does_the_same_work(name: str, job: dict[str, Any], ours: dict[str, Any]) -> None:
    python = LITGPT if name == "litgpt" else sys.executable
    if name == "transformers" and find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    if (
        name == "litgpt"
        and subprocess.run([python, "-c", "import litgpt"], capture_output=True, check=False).returncode
    ):
        pytest.skip("litgpt is not installed; LITGPT_PYTHON names an interpreter that has it")
    program = PEERS[name].program
    assert program is not None
    theirs = run_backend(peer_backend(name, program, job, python))
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["threads"] == ours["threads"]
    for answer in (ours, theirs):
        assert answer["results"][0] == pytest.approx(math.log(512), abs=0.1)
    assert len(set(theirs["results"])) == 3, "the weights or the tokens do not change"
