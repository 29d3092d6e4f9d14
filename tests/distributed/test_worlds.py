"""Two processes learn what one does, by every strategy, and take up each other's checkpoints."""

import signal
from pathlib import Path

import pytest

from gemmule.train.checkpoint import checkpoints
from runs import STEADY, Death, assert_same_curve, gemmule, overrides, start_world, timeless_metrics, write_recipe_file

pytestmark = pytest.mark.slow


def run_world(
    size: int, recipe: Path, run: Path, *changes: str, machine: int | None = None, stop: Death | None = None
) -> None:
    """Go on with a run in so many processes, to its end or to where the first of them is asked to stop."""
    log = run.with_name(f"{run.name}.log")
    words = ("train", recipe, *overrides(*STEADY, *changes), "--out", run, "--resume")
    processes = start_world(size, *words, log=log, machine=machine, deaths={0: stop} if stop else None)
    for process in processes:
        process.join()
    told = "".join(log.with_name(f"{log.name}.{rank}").read_text(errors="replace") for rank in range(size))
    assert [process.exitcode for process in processes] == [130 if stop else 0] * size, told


def in_step(number: int) -> Death:
    """SIGTERM in the n-th step of a process, which all processes then finish."""
    return Death("gemmule.train.loop:lr_scale", number, number=signal.SIGTERM)


@pytest.fixture(scope="module", params=["muon", "adamw"])
def optimizer(request: pytest.FixtureRequest) -> str:
    return f"optimizer.name={request.param}"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, optimizer: str) -> tuple[Path, Path]:
    """A recipe, and its run in one process without accumulation."""
    folder = tmp_path_factory.mktemp("straight")
    recipe, run = write_recipe_file(folder), folder / "run"
    changes = overrides(*STEADY, optimizer, "train.micro_batch_size=8")
    assert gemmule("train", recipe, *changes, "--out", run).code == 0
    return recipe, run


@pytest.mark.parametrize("rows", [4, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(
    straight: tuple[Path, Path], tmp_path: Path, optimizer: str, strategy: str, rows: int
) -> None:
    recipe, alone = straight
    run = tmp_path / "run"
    run_world(2, recipe, run, optimizer, f"parallel.strategy={strategy}", f"train.micro_batch_size={rows}")
    assert_same_curve(run, alone)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_continue_a_model_as_one_does(
    straight: tuple[Path, Path], tmp_path: Path, optimizer: str, strategy: str
) -> None:
    recipe, trained = straight
    start = f"train.start={trained}"
    changes = overrides(*STEADY, optimizer, start, "train.micro_batch_size=8")
    assert gemmule("train", recipe, *changes, "--out", tmp_path / "alone").code == 0
    run_world(2, recipe, tmp_path / "both", optimizer, start, f"parallel.strategy={strategy}")
    assert_same_curve(tmp_path / "both", tmp_path / "alone")
    first, last = (timeless_metrics(run)[end]["loss"] for run, end in ((tmp_path / "both", 0), (trained, -1)))
    assert first < last + 0.5, "it goes on from where the model was"


def test_two_machines_of_two_processes_learn_what_one_does(
    straight: tuple[Path, Path], tmp_path: Path, optimizer: str
) -> None:
    recipe, alone = straight
    run = tmp_path / "run"
    run_world(4, recipe, run, optimizer, "parallel.strategy=hsdp", "train.micro_batch_size=1", machine=2)
    assert_same_curve(run, alone)


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_that_recompute_learn_what_one_does(
    straight: tuple[Path, Path], tmp_path: Path, optimizer: str, strategy: str, how: str
) -> None:
    recipe, alone = straight
    run = tmp_path / "run"
    run_world(2, recipe, run, optimizer, f"parallel.strategy={strategy}", f"parallel.activation_checkpointing={how}")
    assert_same_curve(run, alone)


def test_one_two_and_one_process_go_on_with_each_others_checkpoints(
    straight: tuple[Path, Path], tmp_path: Path, optimizer: str
) -> None:
    recipe, alone = straight
    run = tmp_path / "run"
    stages = [(1, 6, "ddp", 8), (2, 9, "fsdp", 2), (2, 12, "ddp", 4), (4, 15, "fsdp", 1)]
    done = 0
    for size, until, strategy, rows in stages:
        changes = [optimizer, f"parallel.strategy={strategy}", f"train.micro_batch_size={rows}"]
        run_world(size, recipe, run, *changes, stop=in_step(until - done))
        done = until
        assert checkpoints(run)[0].name == f"step-{until:08d}"
    run_world(1, recipe, run, optimizer, "train.micro_batch_size=1")
    assert_same_curve(run, alone)
