"""What do checkpoints cost a run: in time at the default interval, and in memory over a thousand of them?

    python benchmarks/checkpoints.py

Time: stretches of training steps without and with a concurrent checkpoint, interleaved; the difference, divided by
the steps between two checkpoints (`train.checkpoint_every`, by default 500), is what a step pays. A stretch ends when
the checkpoint is whole, so that slower steps while it is written count. Memory: a small model is saved a thousand
times with a step between two; resident memory is read after each. Prints a table, and writes it with machine and
versions to benchmarks/results/checkpoints.json.
"""
# ruff: noqa: E402 - the process is prepared before torch is loaded

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from gemmule.processes import prepare_process
from gemmule.run_folder import RunFolder

prepare_process()  # as the command does

import torch

from gemmule.data.dataset import open_dataset
from gemmule.data.prepare import prepare_dataset
from gemmule.distributed import process_group
from gemmule.runtime import Runtime, choose_precision
from gemmule.settings import read_recipe
from gemmule.train.checkpoint import Saver
from gemmule.train.loop import forward_backward
from gemmule.train.objective import NextToken
from gemmule.train.objectives import training_rows
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import build, resolve_vocabulary
from gemmule.train.settings import TrainSettings
from gemmule.train.state import Position
from harness.trials import machine

ROOT = Path(__file__).parents[1]
INTERVAL = TrainSettings.model_fields["checkpoint_every"].default
DATA = ("data.train=storybook:2000", "tokenizer.vocab_size=2048", "train.compile=false", "train.device=cpu")
WIDE = (
    "model.hidden_size=256", "model.num_hidden_layers=6", "model.sliding_window_pattern=6", "model.head_dim=64",
    "model.num_attention_heads=4", "model.num_key_value_heads=1", "model.query_pre_attn_scalar=64",
    "model.intermediate_size=1024", "model.vocab_size=4096",
)  # fmt: skip
# (name, settings, steps of a stretch)
CASES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("story", (), 24),
    ("six layers of width 256, batch 8", (*WIDE, "train.batch_size=8"), 8),
)


class Run:
    """A model in training that can be saved at any moment."""

    def __init__(self, folder: Path, changes: tuple[str, ...]) -> None:
        self.recipe = read_recipe(ROOT / "recipes/story.toml", Recipe, [*DATA, *changes])
        prepare_dataset(self.recipe.data, self.recipe.tokenizer, folder / "data")
        self.dataset = open_dataset(folder / "data")
        self.recipe = resolve_vocabulary(self.recipe, self.dataset.tokenizer.vocab_size)
        self.rows = training_rows(self.dataset, self.recipe)
        device = torch.device("cpu")
        self.step, self.run = 0, folder / "run"
        with process_group(device) as world:
            self.state = build(self.recipe, Runtime(device, choose_precision("auto", device), world))

    def train(self, steps: int) -> None:
        """Make some optimizer steps."""
        for _ in range(steps):
            size = self.recipe.train.batch_size
            batch = self.rows.rows(self.step * size, size)
            forward_backward(self.state.parallel, batch, batch.num_targets, 0, self.recipe.train, NextToken())
            self.state.optimizers.set_learning_rate(1e-3)
            self.state.optimizers.step()
            self.state.optimizers.zero_grad()
            self.step += 1

    def saver(self) -> Saver:
        """Return what writes its checkpoints, keeping two."""
        return Saver(RunFolder(self.run), self.state, self.dataset.tokenizer, 2)


def time_of_checkpoints(name: str, changes: tuple[str, ...], steps: int, trials: int) -> dict[str, Any]:
    """Compare stretches of training without and with a checkpoint."""
    with tempfile.TemporaryDirectory() as folder, process_group(torch.device("cpu")):
        run = Run(Path(folder), changes)
        saver = run.saver()
        run.train(4)
        without, with_one, blocked = list[float](), list[float](), list[float]()
        for number in range(2 * trials + 2):
            began = time.perf_counter()
            if number % 2:
                saver.save(Position(step=run.step))
                blocked.append(time.perf_counter() - began)
            run.train(steps)
            saver.finish()
            (with_one if number % 2 else without).append(time.perf_counter() - began)
        newest = max((run.run / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in newest.iterdir())
    # The first of each also warms up.
    step = statistics.median(without[1:]) / steps
    extra = statistics.median(b - a for a, b in zip(without[1:], with_one[1:], strict=True))
    return {
        "name": name,
        "parameters": sum(p.numel() for p in run.state.parallel.model.parameters()),
        "checkpoint_megabytes": round(size / 1e6, 1),
        "step_milliseconds": round(1000 * step, 1),
        "training_stands_still_milliseconds": round(1000 * statistics.median(blocked[1:]), 1),
        "checkpoint_costs_milliseconds": round(1000 * extra, 1),
        "share_of_step_time_at_interval": round(extra / (INTERVAL * step), 5),
        "trials": trials,
    }


def memory_of_checkpoints(count: int) -> dict[str, Any]:
    """Save so often, and watch the memory."""
    with tempfile.TemporaryDirectory() as folder, process_group(torch.device("cpu")):
        run = Run(Path(folder), ("train.batch_size=2", "train.context=64"))
        saver, resident = run.saver(), []
        for _ in range(count):
            run.train(1)
            saver.save(Position(step=run.step))
            resident.append(_resident())
        saver.finish()
        left = sorted(folder.name for folder in (run.run / "checkpoints").iterdir())
    tenth = max(1, count // 10)
    return {
        "checkpoints": count,
        "kept": len(left),
        "resident_megabytes": [
            round(statistics.median(resident[i : i + tenth]) / 1e6, 1) for i in range(0, count, tenth)
        ],
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure both and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/checkpoints.json")
    options = parser.parse_args()
    cases = [time_of_checkpoints(*case, options.trials) for case in CASES]
    result = {
        "benchmark": "checkpoints",
        "interval": INTERVAL,
        "time": cases,
        "memory": memory_of_checkpoints(options.count),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
