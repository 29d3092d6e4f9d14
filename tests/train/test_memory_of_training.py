import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemmule.data.settings import DataSettings
from gemmule.errors import DeviceError
from gemmule.train.checkpoint import checkpoints
from gemmule.train.memory import largest_tensors, out_of_memory_explained
from gemmule.train.parallel import ParallelSettings
from gemmule.train.recipe import Recipe
from gemmule.train.settings import TrainSettings
from runs import overrides
from tiny import tiny_config

CPU = torch.device("cpu")
SETTINGS = TrainSettings(steps=1, batch_size=12, context=16, precision="fp32")
GEMMA = tiny_config(vocab_size=262_144, hidden_size=64)


def recipe_of(settings: TrainSettings, parallel: ParallelSettings = ParallelSettings()) -> Recipe:  # noqa: B008
    return Recipe(data=DataSettings(train=("unused.txt",)), model=GEMMA, train=settings, parallel=parallel)


def complaint(error: Exception, settings: TrainSettings = SETTINGS, **parallel: str) -> str:
    recipe = recipe_of(settings, ParallelSettings.model_validate(parallel))
    with pytest.raises(DeviceError) as caught, out_of_memory_explained(recipe, CPU):
        raise error
    return str(caught.value)


def test_the_largest_tensors_come_first_with_their_sizes() -> None:
    settings = TrainSettings(steps=1, batch_size=64, micro_batch_size=8, context=64, precision="fp32")
    largest = largest_tensors(recipe_of(settings), CPU)
    assert str(largest[0]) == "weights, gradients and moments of the embedding 4 x (262144, 64) = 256 MiB"
    assert str(largest[1]) == "logits and their gradient 3 x (64, 262144) = 192 MiB"
    assert [large.bytes for large in largest] == sorted((large.bytes for large in largest), reverse=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "mps", "python"],
)
def test_every_allocators_refusal_is_recognised(error: Exception) -> None:
    sentence = complaint(error)
    assert sentence.startswith("out of memory (")
    assert "logits and their gradient 3 x (64, 262144)" in sentence
    assert "train.micro_batch_size = 6 (it is 12; the result stays the same)" in sentence
    assert "parallel.activation_checkpointing" in sentence
    assert '"fsdp"' in sentence


def test_what_is_done_already_is_not_advised() -> None:
    rows = TrainSettings(steps=1, batch_size=12, micro_batch_size=1, context=16)
    sentence = complaint(MemoryError(), rows, strategy="fsdp", activation_checkpointing="full")
    assert sentence.endswith("with --resume: a shorter train.context (it is 16), for a new run")


def test_other_errors_pass() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes"),
        out_of_memory_explained(recipe_of(SETTINGS), CPU),
    ):
        raise RuntimeError("shapes do not fit")


@pytest.mark.slow
def test_memory_that_runs_out_is_told_and_fewer_rows_go_on(tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wide = overrides("train.batch_size=4096", "model.hidden_size=256", "model.intermediate_size=2048", "train.steps=1")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (9 << 30, 9 << 30))"
    command = [
        sys.executable,
        "-c",
        f"{limit}; from gemmule.cli.main import main; main()",
        "train",
        str(tiny_recipe),
        *wide,
        "--out",
        str(run),
    ]
    rows = overrides("train.micro_batch_size=4096")
    ended = subprocess.run([*command, *rows], capture_output=True, text=True, errors="replace", check=False)
    assert ended.returncode == 2, ended.stderr
    sentence = ended.stderr[ended.stderr.index("gemmule: out of memory") :]
    assert "activations of the MLPs 16 x (4096, 32, 2048) = 16,384 MiB" in sentence
    assert "Traceback" not in ended.stderr
    less = overrides("train.micro_batch_size=256")
    ended = subprocess.run([*command, *less, "--resume"], capture_output=True, text=True, errors="replace", check=False)
    assert ended.returncode == 0, ended.stderr
    assert checkpoints(run)[0].name == "step-00000001"
