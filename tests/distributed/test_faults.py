"""A process that dies ends the run with its reason, and what torchrun starts again goes on; signals save."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from damage import damaged
from gemmule.train.checkpoint import checkpoints, newest_checkpoint
from runs import Death, final_weights, overrides, start_world, steps_done, timeless_metrics, wait_until, workers

pytestmark = pytest.mark.slow

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@contextmanager
def torchrun(recipe: Path, run: Path, *options: str, steps: int = 30) -> "Iterator[subprocess.Popen[str]]":
    """Start a run of two processes as a user would; it does not outlive the block."""
    command = [*TORCHRUN, *options, "-m", "gemmule", "train", str(recipe), *overrides(f"train.steps={steps}")]
    command += ["--out", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """The run of two processes that nothing happened to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    with torchrun(tiny_recipe, run) as process:
        _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return run


SLOW_SAMPLES = """
import sys, time
from datetime import timedelta
from gemmule import distributed
from gemmule.cli.main import main
from gemmule.train import run

def gather_slowly(*arguments, once=[True]):
    model = gather_model(*arguments)
    if model is not None and once:
        once.clear()
        time.sleep(40)
    return model

distributed._STEP_TIMEOUT = timedelta(seconds=20)
gather_model, run.gather_model = run.gather_model, gather_slowly
main()
"""


def test_samples_may_take_longer_than_the_processes_wait_within_a_step(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_SAMPLES)
    command = [*TORCHRUN, str(tmp_path / "slow.py"), "train", str(tiny_recipe), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert steps_done(tmp_path / "run") == 12


SLOW_WRITES = """
import os, time
from gemmule.cli.main import main
from gemmule.train import objectives, storage

write_data, score, nats = storage.Writer.write_data, objectives.score, [1.0]

def write_slowly(*arguments):
    time.sleep(int(os.environ["RANK"]))  # ranks reach the collectives of a checkpoint at different times
    return write_data(*arguments)

def worse_each_time(*arguments):
    nats.append(nats[-1] + 1)  # the best checkpoint would be waited for
    return score(*arguments)._replace(nats=nats[-1])

storage.Writer.write_data, objectives.score = write_slowly, worse_each_time
main()
"""


def test_samples_do_not_wait_for_a_checkpoint_in_the_background(tiny_recipe: Path, tmp_path: Path) -> None:
    """Collectives of two threads, in one group and in different orders on the ranks, once waited for each other."""
    (tmp_path / "slow.py").write_text(SLOW_WRITES)
    command = [*TORCHRUN, str(tmp_path / "slow.py"), "train", str(tiny_recipe), "--out", str(tmp_path / "run")]
    command += overrides("train.validate_every=3")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert steps_done(tmp_path / "run") == 12


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_run_at_once(tiny_recipe: Path, tmp_path: Path, rank: int) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    death = Death("gemmule.train.loop:lr_scale", 8)
    processes = start_world(2, "train", tiny_recipe, "--out", run, log=log, deaths={rank: death})
    for process in processes:
        process.join(120)
    other = 1 - rank
    assert processes[rank].exitcode == -signal.SIGKILL
    assert processes[other].exitcode == 1
    told = log.with_name(f"log.{other}").read_text(errors="replace")
    sentence = told[told.index("gemmule: ") :]
    assert sentence.startswith(f"gemmule: rank {other}: lost contact with another process of the run (")
    assert "the same command with --resume resumes the run" in sentence
    assert "Traceback" not in told
    assert checkpoints(run)[-1].name == "step-00000003", "that of step 6 may have been whole already"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_torchrun_starts_again_goes_on_to_the_same_end(
    tiny_recipe: Path, tmp_path: Path, straight: Path, rank: int
) -> None:
    run = tmp_path / "run"
    with torchrun(tiny_recipe, run, "--max-restarts", "3") as process:
        wait_until(lambda: len(checkpoints(run)) > 0)
        os.kill(workers(process.pid)[rank], signal.SIGKILL)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert re.search(r"resuming from .*step-\d+, after step", told)
    assert final_weights(run) == final_weights(straight)
    assert timeless_metrics(run) == timeless_metrics(straight)


def test_a_failure_of_one_process_is_the_reason_that_torchrun_gives(tiny_recipe: Path, tmp_path: Path) -> None:
    with torchrun(tiny_recipe, tmp_path / "run", steps=0) as process:
        _, told = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "train.steps = 0: must be a whole number from 1 to 1,000,000,000" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_says_how_to_go_on(
    tiny_recipe: Path, tmp_path: Path, straight: Path, number: int
) -> None:
    run = tmp_path / "run"
    with torchrun(tiny_recipe, run) as process:
        wait_until(lambda: steps_done(run) >= 4)
        process.send_signal(number)
        _, told = process.communicate(timeout=300)
    assert process.returncode != 0
    ((step, again),) = re.findall(r"stopped after step (\d+), which is saved; resume with:  (.*)", told)
    assert checkpoints(run)[0].name == f"step-{int(step):08d}"
    words = shlex.split(again)
    assert words[:3] == ["torchrun", "...", "-m"]
    ended = subprocess.run([*TORCHRUN, *words[2:]], capture_output=True, text=True, errors="replace", check=False)
    assert ended.returncode == 0, ended.stderr
    assert final_weights(run) == final_weights(straight)
    assert timeless_metrics(run) == timeless_metrics(straight)


def test_damaged_checkpoints_of_two_processes_are_named_and_passed_over(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    newest, older = checkpoints(run)
    files = {file.name for file in newest.glob("*.safetensors")}
    assert files == {f"{kind}-0000{place}-of-00002.safetensors" for kind in ("model", "optimizer") for place in (1, 2)}
    for name, how in damaged(newest, older):
        good, sentences = newest_checkpoint(run)
        assert good == older, f"{name}: {how}"
        assert [newest.name in sentence for sentence in sentences] == [True], f"{name}: {how}"
    one, other = (newest / f"model-0000{place}-of-00002.safetensors" for place in (1, 2))
    swapped = other.read_bytes(), one.read_bytes()
    one.write_bytes(swapped[0])
    other.write_bytes(swapped[1])
    assert newest_checkpoint(run)[0] == older
