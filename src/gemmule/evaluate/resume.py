"""Is a resumed run the run that was never stopped? Run it, run it again under `kill -9`, and compare the bits."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.errors import GemmuleError
from gemmule.files import sha256
from gemmule.recipe import write_recipe
from gemmule.train.checkpoint import checkpoints
from gemmule.train.metrics import read_json_lines
from gemmule.train.run import Recipe

# What the clock decides.
_TIMING = ("seconds", "tokens_per_second")


class Verdict(NamedTuple):
    """What came of two runs of one recipe, of which the second was killed again and again."""

    steps: int
    kills: list[int]  # the steps that metrics.jsonl had seen at each
    while_saving: int  # how many of the kills came while a checkpoint was being written
    differences: list[str]  # none where all bits are the same


def shortened(recipe: Recipe, steps: int, kills: int) -> Recipe:
    """Return a recipe of at most so many steps that saves about as often as it is killed, validates and logs."""
    steps = min(steps, recipe.train.steps)
    often = max(1, steps // max(7, kills))
    changes = {"steps": steps, "minutes": None, "checkpoint_every": often, "validate_every": 3 * often}
    return recipe.replace(train=recipe.train.replace(log_every=1, **changes))


def resume_check(recipe: Recipe, folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> Verdict:
    """Train a recipe in folder/straight, and in folder/killed with `kill -9` at random moments; compare all they wrote.

    Raises GemmuleError where a run ends otherwise.
    """
    draw, steps = random.Random(seed), recipe.train.steps
    straight, killed, given = folder / "straight", folder / "killed", folder / "recipe.toml"
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, given, "What is checked.", given_only=True)
    began = time.monotonic()
    with _training(given, straight) as process:
        _expect_success(process)
    say(f"{steps} steps without an interruption: {time.monotonic() - began:.0f} s")
    # The second run follows the first one's resolved recipe, and reads the data that it prepared.
    killed.mkdir()
    shutil.copy(straight / "recipe.toml", killed)
    if (straight / "data").exists():
        (killed / "data").symlink_to((straight / "data").absolute())
    pace = read_json_lines(straight / "metrics.jsonl")[-1]["seconds"] / steps
    moments: list[int] = []
    while_saving = 0
    # Several may fall into one step: the run then goes back to the checkpoint before it, and is killed there again.
    last = max(1, steps - recipe.train.checkpoint_every)
    for number, target in enumerate(sorted(draw.randrange(last) for _ in range(kills))):
        left_over = _half_written(killed)
        with _training(straight / "recipe.toml", killed) as process:
            saving = number % 3 == 2  # moments that random ones seldom meet
            if not _wait_for_a_moment(process, killed, target, saving, draw.uniform(0, 0.01 if saving else 2 * pace)):
                break  # it came to its end before the moment did
            process.kill()
        moments.append(_steps_seen(killed))
        saved = bool(_half_written(killed) - left_over)
        while_saving += saved
        say(f"killed when step {moments[-1]} of {steps} was done" + ", while saving" * saved)
    with _training(straight / "recipe.toml", killed) as process:
        _expect_success(process)
    return Verdict(steps, moments, while_saving, list(_differences(straight, killed)))


def _training(recipe: Path, run: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "gemmule", "train", str(recipe), "--out", str(run), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")


def _expect_success(process: "subprocess.Popen[str]") -> None:
    _, told = process.communicate()
    if process.returncode:
        raise GemmuleError(f"the run ended with exit code {process.returncode}: {told.strip().splitlines()[-1:]}")


def _wait_for_a_moment(process: "subprocess.Popen[str]", run: Path, target: int, saving: bool, delay: float) -> bool:
    """Wait until the process has done a step, and then a while longer or for a checkpoint; False where it has ended."""
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
    last, its_twin = checkpoints(one)[0], checkpoints(other)[0]
    pairs = [(file, its_twin / file.name) for file in sorted(last.glob("*.safetensors"))]
    pairs.append((one / "samples.jsonl", other / "samples.jsonl"))
    yield from (a.name for a, b in pairs if not b.exists() or sha256(a) != sha256(b))
    lines, others = ([_timeless(line) for line in read_json_lines(run / "metrics.jsonl")] for run in (one, other))
    if len(lines) != len(others):
        yield f"metrics.jsonl: {len(lines)} and {len(others)} lines"
    yield from [f"metrics.jsonl at step {a['step']}" for a, b in zip(lines, others, strict=False) if a != b][:1]


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in _TIMING}
