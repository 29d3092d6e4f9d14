"""Ten steps equal five, a kill, and five: whole runs by the real command line, in processes that really die."""

import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest

from gemmule.run_folder import read_json_lines
from gemmule.train.checkpoint import checkpoints
from runs import Death, final_weights, gemmule, start, steps_done, timeless_metrics

pytestmark = pytest.mark.usefixtures("without_plots")

KILLED, INTERRUPTED = -signal.SIGKILL, 130

# Each process takes up what the one before it left.
WHILE_SAVING = {
    "before step 0": Death("gemmule.train.run:build", 1),
    "before the first checkpoint": Death("gemmule.train.checkpoint:async_save", 1),
    "while files are written aside": Death("gemmule.train.storage:save_file", 2),
    "before a folder takes its name": Death("gemmule.files:_exchange", 1),
    "after it took its name": Death("gemmule.files:_exchange", 1, after=True),
    "before old ones are removed": Death("gemmule.train.checkpoint:prune_checkpoints", 2),
    "while an old one is removed": Death("os:rmdir", 1),
    "before the model folder is written": Death("gemmule.train.run:save_folder", 1),
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What the processes print."""
    return tmp_path / "log.txt"


def same_run(run: Path, straight: Path) -> bool:
    """Say whether two runs ended alike: weights by their bits, metrics but for the clock, samples, checkpoints."""
    return (
        final_weights(run) == final_weights(straight)
        and timeless_metrics(run) == timeless_metrics(straight)
        and (run / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
        and [folder.name for folder in checkpoints(run)] == [folder.name for folder in checkpoints(straight)]
    )


def finish(recipe: Path, run: Path) -> None:
    ended = gemmule("train", recipe, "--out", run, "--resume")
    assert ended.code == 0, ended.err


def test_a_run_killed_between_checkpoints_equals_one_that_was_not(
    tiny_recipe: Path, tiny_run: Path, tmp_path: Path, log: Path
) -> None:
    run = tmp_path / "tiny"
    for _ in range(2):  # killed in step 5, resumed from step 3, and killed in step 8
        death = Death("gemmule.train.loop:lr_scale", 5)
        process = start("train", tiny_recipe, "--out", run, "--resume", log=log, death=death)
        process.join()
        assert process.exitcode == KILLED, log.read_text()
        assert not (run / "model").exists()
    assert steps_done(run) in (4, 7), "a busy machine may not have written the checkpoint by then"
    finish(tiny_recipe, run)
    assert same_run(run, tiny_run)


@pytest.mark.slow
def test_a_run_killed_again_and_again_while_saving_equals_one_that_was_not(
    tiny_recipe: Path, tiny_run: Path, tmp_path: Path, log: Path
) -> None:
    run, left = tmp_path / "tiny", []
    for moment, death in WHILE_SAVING.items():
        process = start("train", tiny_recipe, "--out", run, "--resume", log=log, death=death)
        process.join()
        assert process.exitcode == KILLED, f"{moment}: {log.read_text()}"
        left.append([int(folder.name.removeprefix("step-")) for folder in checkpoints(run)])
    assert left == [[], [], [], [], [3], [9, 6, 3], [12, 9, 6, 3], [12, 9]]
    finish(tiny_recipe, run)
    assert same_run(run, tiny_run)


@pytest.mark.slow
def test_a_killed_run_over_weighted_sources_equals_one_that_was_not(
    tiny_recipe: Path, tmp_path: Path, log: Path
) -> None:
    sources = 'data.train=["storybook:40", "storybook:60"]'
    validation = "data.validation=storybook:20"
    weights = "data.weights=[3.0, 1.0]"
    settings = ("--set", sources, "--set", weights, "--set", validation)
    arguments = ("train", tiny_recipe, *settings, "--resume", "--out")
    straight, run = tmp_path / "straight", tmp_path / "killed"
    assert gemmule(*arguments, straight).code == 0
    for _ in range(2):
        process = start(*arguments, run, log=log, death=Death("gemmule.train.loop:lr_scale", 5))
        process.join()
        assert process.exitcode == KILLED, log.read_text()
    assert gemmule(*arguments, run).code == 0
    assert same_run(run, straight)


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_recipe: Path, tiny_run: Path, tmp_path: Path, log: Path) -> None:
    run = tmp_path / "my runs" / "tiny"  # a space, for what is printed goes to a shell
    death = Death("gemmule.train.loop:lr_scale", 5, number=signal.SIGINT)
    process = start("train", tiny_recipe, "--set", "train.log_every=1", "--out", run, log=log, death=death)
    process.join()
    assert process.exitcode == INTERRUPTED, log.read_text()
    ((step, again),) = re.findall(r"stopped after step (\d+), which is saved; resume with:  (.*)", log.read_text())
    assert step == "5"
    assert checkpoints(run)[0].name == "step-00000005"
    program, *arguments = shlex.split(again)
    assert program == "gemmule"
    assert gemmule(*arguments).code == 0
    assert final_weights(run) == final_weights(tiny_run)
    assert timeless_metrics(run) == timeless_metrics(tiny_run)


def test_a_finished_run_is_resumed_to_itself(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "tiny")
    shutil.rmtree(run / "model")
    finish(tiny_recipe, run)
    assert same_run(run, tiny_run)


def test_the_resolved_recipe_repeats_the_run(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    assert gemmule("train", tiny_run / "recipe.toml", "--out", run).code == 0
    assert same_run(run, tiny_run)
    assert (run / "recipe.toml").read_text() == (tiny_run / "recipe.toml").read_text()


def test_a_damaged_checkpoint_is_passed_over(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "tiny")
    newest = checkpoints(run)[0] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    ended = gemmule("train", tiny_recipe, "--out", run, "--resume")
    assert ended.code == 0
    assert f"skipped a damaged checkpoint: {newest}: damaged" in ended.err
    assert "step-00000009, after step 9" in ended.err
    assert same_run(run, tiny_run)


@pytest.mark.slow
def test_micro_batches_change_the_result_by_rounding_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    losses = []
    for rows in (2, 8):
        run = tmp_path / str(rows)
        changes = [
            "train.steps=4",
            f"train.micro_batch_size={rows}",
            "model.dropout=0.0",
            "model.attention_dropout=0.0",
        ]
        overrides = [part for change in changes for part in ("--set", change)]
        assert gemmule("train", tiny_recipe, *overrides, "--out", run).code == 0
        losses.append([line["loss"] for line in read_json_lines(run / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_killed_at_any_moment_equals_one_that_was_not(
    tiny_recipe: Path, tmp_path: Path, log: Path, threads: int
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "killed"
    start("--version", log=log).join()  # the first process waits until the server of processes has loaded torch
    began = time.monotonic()
    process = start("train", tiny_recipe, "--out", straight, log=log, threads=threads)
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0, log.read_text()
    for kills in range(30):  # each goes on a little farther than the one before it; about the eighth one ends
        process = start("train", tiny_recipe, "--out", run, "--resume", log=log, threads=threads)
        process.join(seconds * (kills + 1) / 10)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == KILLED, log.read_text()
    assert kills > 3, "it was killed a few times"
    assert same_run(run, straight)
