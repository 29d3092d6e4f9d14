"""Fault injection: train a recipe, train it again under `kill -9` with resume, and compare the results bit for bit."""

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.errors import GemmuleError
from gemmule.files import sha256
from gemmule.processes import python_module_command
from gemmule.run_folder import read_json_lines
from gemmule.settings import write_recipe
from gemmule.train.checkpoint import checkpoints
from gemmule.train.recipe import Recipe

# Keys of metrics.jsonl that differ from run to run.
_TIMING = ("seconds", "tokens_per_second")


class Verdict(NamedTuple):
    """The result of two runs of one recipe, of which the second was killed repeatedly."""

    steps: int
    kills: list[int]  # the last step in metrics.jsonl at each kill
    while_saving: int  # how many of the kills came while a checkpoint was being written
    differences: list[str]  # none where all bits are the same


def shortened(recipe: Recipe, steps: int, kills: int) -> Recipe:
    """Return a recipe of at most `steps` steps that checkpoints about once per kill, validates, and logs each step."""
    steps = min(steps, recipe.train.steps)
    often = max(1, steps // max(7, kills))
    changes = {"steps": steps, "minutes": None, "checkpoint_every": often, "validate_every": 3 * often}
    return recipe.replace(train=recipe.train.replace(log_every=1, **changes))


def resume_check(recipe: Recipe, folder: Path, kills: int, seed: int, log: Callable[[str], None]) -> Verdict:
    """Train a recipe in folder/straight, and in folder/killed under `kill -9` at random times; compare their files.

    Raises GemmuleError where a run ends otherwise.
    """
    draw, steps = random.Random(seed), recipe.train.steps
    straight, killed, given = folder / "straight", folder / "killed", folder / "recipe.toml"
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, given, "What is checked.", given_only=True)
    began = time.monotonic()
    with _training(given, straight) as process:
        _expect_success(process)
    log(f"{steps} steps without an interruption: {time.monotonic() - began:.0f} s")
    # The second run follows the first one's resolved recipe, and reads the data that it prepared.
    killed.mkdir()
    shutil.copy(straight / "recipe.toml", killed)
    if (straight / "data").exists():
        (killed / "data").symlink_to((straight / "data").absolute())
    pace = read_json_lines(straight / "metrics.jsonl")[-1]["seconds"] / steps
    killed_after: list[int] = []
    while_saving = 0
    # Several may fall into one step: the run then goes back to the checkpoint before it, and is killed there again.
    last = max(1, steps - recipe.train.checkpoint_every)
    for number, target in enumerate(sorted(draw.randrange(last) for _ in range(kills))):
        left_over = _half_written(killed)
        with _training(straight / "recipe.toml", killed) as process:
            saving = number % 3 == 2  # random times seldom fall into a checkpoint
            if not _wait_for_step(process, killed, target, saving, draw.uniform(0, 0.01 if saving else 2 * pace)):
                break  # the run ended before the kill
            process.kill()
        killed_after.append(_steps_seen(killed))
        saved = bool(_half_written(killed) - left_over)
        while_saving += saved
        log(f"killed after step {killed_after[-1]} of {steps}" + ", during a checkpoint" * saved)
    with _training(straight / "recipe.toml", killed) as process:
        _expect_success(process)
    return Verdict(steps, killed_after, while_saving, list(_differences(straight, killed)))


def _training(recipe: Path, run: Path) -> "subprocess.Popen[str]":
    command = python_module_command("gemmule", "train", str(recipe), "--out", str(run), "--resume")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")


def _expect_success(process: "subprocess.Popen[str]") -> None:
    _, stderr = process.communicate()
    if process.returncode:
        raise GemmuleError(f"the run ended with exit code {process.returncode}: {stderr.strip().splitlines()[-1:]}")


def _wait_for_step(process: "subprocess.Popen[str]", run: Path, target: int, saving: bool, delay: float) -> bool:
    """Wait for a step or a checkpoint after it, then for `delay` seconds; False where the process has ended."""
    metrics = run / "metrics.jsonl"
    # Lines of steps that were not saved stand there until the process repeats them, and half-written folders too.
    before, left_over = _changed(metrics), _half_written(run)
    while process.poll() is None:
        if saving:
            reached = any(step >= target for step, _ in _half_written(run) - left_over)
        else:
            reached = _changed(metrics) != before and _steps_seen(run) >= target
        if reached:
            time.sleep(delay)  # somewhere in a step, a validation, or the writing of a checkpoint
            return process.poll() is None
        time.sleep(0.001)
    _expect_success(process)
    return False


def _half_written(run: Path) -> set[tuple[int, int]]:
    """Return the steps and inodes of the folders in which a checkpoint is being written, or was when a kill came."""
    found = set()
    for folder in (run / "checkpoints").glob(".step-*.partial"):
        with suppress(FileNotFoundError):  # it is whole by now
            found.add((int(folder.name.removeprefix(".step-").removesuffix(".partial")), folder.stat().st_ino))
    return found


def _changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _steps_seen(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _differences(one: Path, other: Path) -> Iterator[str]:
    """Name the files that differ, and of the metrics the first step."""
    last, last_of_other = checkpoints(one)[0], checkpoints(other)[0]
    pairs = [(file, last_of_other / file.name) for file in sorted(last.glob("*.safetensors"))]
    pairs.append((one / "samples.jsonl", other / "samples.jsonl"))
    yield from (a.name for a, b in pairs if not b.exists() or sha256(a) != sha256(b))
    lines, others = ([_without_timing(line) for line in read_json_lines(run / "metrics.jsonl")] for run in (one, other))
    if len(lines) != len(others):
        yield f"metrics.jsonl: {len(lines)} and {len(others)} lines"
    yield from [f"metrics.jsonl at step {a['step']}" for a, b in zip(lines, others, strict=False) if a != b][:1]


def _without_timing(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in _TIMING}
