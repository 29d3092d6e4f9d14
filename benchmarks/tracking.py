"""What tracking costs a training step: runs with and without trackers, interleaved, and the calls timed alone.

    python benchmarks/tracking.py recipes/story.toml --to mlflow --steps 150

Without a server the services are offline: wandb writes files, mlflow a SQLite database, trackio its own.
`--address http://127.0.0.1:9` names a server that refuses. Prints a JSON object; ratios are of the median step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from gemmule.processes import python_module_command
from gemmule.run_folder import RunFolder
from gemmule.tracking import Tracking, TrackingSettings

WARM = 20  # steps in which caches fill and the client is loaded


def environment(folder: Path, address: str | None) -> dict[str, str]:
    """Return the variables that keep the clients offline, or lead them to an address."""
    if address:
        servers = {"MLFLOW_TRACKING_URI": address, "WANDB_BASE_URL": address, "TRACKIO_SERVER_URL": address}
        return {**servers, "WANDB_API_KEY": "0" * 40, "TRACKIO_WRITE_TOKEN": "none"}
    database = f"sqlite:///{folder}/mlflow.db"
    return {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": database, "TRACKIO_DIR": str(folder / "trackio")}


def step_seconds(recipe: Path, data: Path | None, folder: Path, trackers: list[str], steps: int) -> list[float]:
    """Train, and return the seconds of each step after the first."""
    settings = [f"tracking.to={json.dumps(trackers)}", f"train.steps={steps}", "train.minutes=none"]
    settings += ["train.log_every=1", f"train.validate_every={steps}", f"train.checkpoint_every={steps}"]
    settings += ["train.precision=fp32", "train.attention=sdpa", "train.compile=false"]
    settings += [f"data.train={data}"] if data else []
    changes = [word for setting in settings for word in ("--set", setting)]
    command = python_module_command("gemmule", "train", str(recipe), "--out", str(folder), *changes)
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = [line["seconds"] for line in RunFolder(folder).read_metrics()][WARM:]
    return [after - before for before, after in pairwise(seconds)]


def call_seconds(folder: Path, tracker: str) -> dict[str, float]:
    """Time the calls that the loop makes, while the client sends what is written beside them."""
    folder.mkdir()
    run = RunFolder(folder)
    run.recipe.write_text("[train]\nsteps = 400\n", encoding="utf-8")
    start = time.perf_counter()
    tracking, calls = Tracking(TrackingSettings(to=(tracker,)), run, 0), []
    started = time.perf_counter() - start
    for step in range(1, 401):
        line = {"step": step, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 1.0, "seconds": step / 20}
        with run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        start = time.perf_counter()
        tracking.log_metrics(line)
        calls.append(time.perf_counter() - start)
        time.sleep(0.05)
    start = time.perf_counter()
    tracking.stop()
    tracking.finish()
    end = time.perf_counter() - start
    return {"start": started, "median_call": statistics.median(calls), "largest_call": max(calls), "finish": end}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both in interleaved trials."""
    os.environ |= environment(folder, arguments.address)
    data, without = folder / "prepared" / "data", list[float]()
    step_seconds(arguments.recipe, None, folder / "prepared", [], WARM + 2)
    trials = {name: list[float]() for name in arguments.to}
    for trial in range(arguments.trials):
        for name in ("none", *arguments.to):
            trackers = [] if name == "none" else [name]
            seconds = step_seconds(arguments.recipe, data, folder / f"{name}-{trial}", trackers, arguments.steps)
            (without if name == "none" else trials[name]).append(statistics.median(seconds))
    base = statistics.median(without)
    return {
        "step_seconds_without": without,
        "services": {
            name: {
                "step_seconds": seconds,
                "ratio": statistics.median(seconds) / base,
                "calls": (calls := call_seconds(folder / f"calls-{name}", name)),
                "median_call_share_of_step": calls["median_call"] / base,
            }
            for name, seconds in trials.items()
        },
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--to", action="append", required=True, help="a tracker; may be repeated")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--address", help="a server, such as http://127.0.0.1:9, which refuses")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, Path(folder)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
