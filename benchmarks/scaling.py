"""Time and memory of a training step by context, window, batch, vocabulary, width and processes.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json --picture docs/images/scaling.png

Takes the step of `benchmarks/train.py` (AdamW, random tokens, not compiled unless --compile) on a small shape, and
changes one thing at a time: the context at equal tokens per step, the same where all layers are local, the window, the
batch, the vocabulary, the width of the model, the number of processes. Each point is a process of its own, in
--trials interleaved trials. Prints a table, and writes JSON and a picture. About ten minutes on two cores.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.run_folder import read_json_lines
from gemmule.settings import check_recipe
from gemmule.train.recipe import Recipe
from harness.backends import Backend, gemmule_backend
from harness.train import job_of
from harness.trials import Budget, machine, run_trials, spread

LOCAL = "context, all layers local"
TOKENS = 4096  # of a step, where the batch is not what changes
BASE: dict[str, Any] = {
    "data": {"train": "storybook"},
    "tokenizer": {"vocab_size": 1024},
    "model": {
        "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "query_pre_attn_scalar": 64, "intermediate_size": 512, "sliding_window": 128, "sliding_window_pattern": 6,
    },
    "train": {"steps": 1, "batch_size": TOKENS // 256, "context": 256, "device": "cpu", "attention": "auto"},
}  # fmt: skip


class Point(NamedTuple):
    """One shape."""

    axis: str
    value: int
    changes: dict[str, int]


def points(only: list[str]) -> Iterator[Point]:
    """Yield what is measured."""
    contexts = {n: {"train.context": n, "train.batch_size": TOKENS // n} for n in (256, 512, 1024, 2048, 4096)}
    changes: dict[str, dict[int, dict[str, int]]] = {
        "context": contexts,
        LOCAL: {n: changed | {"model.sliding_window_pattern": 7} for n, changed in contexts.items()},
        "window": {
            n: {"model.sliding_window": n, "train.context": 1024, "train.batch_size": TOKENS // 1024}
            for n in (32, 128, 512, 1024)
        },
        "batch": {n: {"train.batch_size": n} for n in (1, 4, 16, 64)},
        "vocabulary": {n: {"tokenizer.vocab_size": n} for n in (1024, 4096, 16384, 65536)},
        "width": {
            n: {"model.hidden_size": n, "model.intermediate_size": 4 * n, "model.num_attention_heads": max(1, n // 64)}
            for n in (64, 128, 256, 512)
        },
    }
    for axis in only:
        yield from (Point(axis, value, changed) for value, changed in changes.get(axis, {}).items())


def recipe_of(changes: dict[str, int], compiled: bool) -> Recipe:
    """Return the base shape with some settings changed."""
    table = copy.deepcopy(BASE)
    for key, value in changes.items():
        group, _, name = key.partition(".")
        table[group][name] = value
    table["train"]["compile"] = compiled
    return check_recipe(table, Recipe, "of the benchmark")


def processes(number: int, folder: Path, trials: int) -> dict[str, Any]:
    """Train the base shape by so many processes, the cores shared among them, on stories."""
    data, recipe = folder / "data", folder / "base.toml"
    if not data.exists():
        gemmule(["-m", "gemmule", "prepare", "storybook:2000", "--vocab-size", "1024", "--out", str(data)], 1)
    table = BASE | {"data": {"train": str(data)}, "train": BASE["train"] | {"steps": 20, "log_every": 1}}
    lines = [f"[{g}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in group.items()) for g, group in table.items()]
    recipe.write_text("\n".join(lines), encoding="utf-8")
    rates = []
    for trial in range(trials):
        out = folder / f"run-{number}-{trial}"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        gemmule([*launcher, "-m", "gemmule", "train", str(recipe), "--out", str(out)], number)
        lines_of_metrics = read_json_lines(out / "metrics.jsonl")[5:]  # the first steps fill caches
        rates.append(statistics.median(line["tokens_per_second"] for line in lines_of_metrics))
    return {"axis": "processes", "value": number, "tokens_per_second": spread(rates), "peak_memory": None}


def gemmule(words: list[str], number: int) -> None:
    """Run a command that starts so many processes to its end; its standard error is shown where it fails."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // number))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(ended.stderr)


def measure(only: list[str], trials: int, steps: int, compiled: bool) -> list[dict[str, Any]]:
    """Measure every point in interleaved trials."""
    wanted = list(points(only))
    backends: list[Backend] = []
    for point in wanted:
        job = job_of(recipe_of(point.changes, compiled), Budget(trials, 0.0, steps, 2))
        backends.append(gemmule_backend(f"{point.axis} {point.value}", "train", job))
    say = lambda label, done, total: print(f"{label} ({done} of {total})", file=sys.stderr)  # noqa: E731
    measurements = run_trials(backends, trials, say)
    found = []
    for point, backend in zip(wanted, backends, strict=True):
        tokens = backend.job["batch"] * backend.job["context"]
        seconds = [statistics.median(one["seconds"]) for one in measurements[backend.name]]
        found.append(
            {"axis": point.axis, "value": point.value, "tokens_per_step": tokens, "step_seconds": spread(seconds)}
            | {"tokens_per_second": spread(tokens / value for value in seconds)}
            | {"peak_memory": max(one["peak_memory"] or 0 for one in measurements[backend.name]) or None}
            | {"parameters": measurements[backend.name][0]["parameters"]}
        )
    return found


def draw(found: list[dict[str, Any]], picture: Path) -> None:
    """Plot tokens per second and peak memory against each variable."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(point["axis"] for point in found))
    figure = Figure(figsize=(14, 6), layout="constrained")
    places = figure.subplots(2, 4).flatten()
    for axes in places[len(axes_names) :]:
        axes.set_visible(False)
    for axes, name in zip(places, axes_names, strict=False):
        chosen = [point for point in found if point["axis"] == name]
        values = [point["value"] for point in chosen]
        axes.plot(values, [point["tokens_per_second"]["median"] for point in chosen], "o-", color="#1f4e8c")
        axes.set(title=name, xscale="log", xticks=values, xticklabels=[f"{value:,}" for value in values])
        axes.set_ylim(0, 1.1 * max(point["tokens_per_second"]["median"] for point in chosen))
        axes.minorticks_off()
        axes.set_ylabel("tokens/s", color="#1f4e8c")
        if all(point["peak_memory"] for point in chosen):
            other = axes.twinx()
            other.plot(values, [point["peak_memory"] / 2**20 for point in chosen], "s--", color="#c0392b")
            other.set_ylabel("MiB", color="#c0392b")
            other.set_ylim(0, 1.1 * max(point["peak_memory"] for point in chosen) / 2**20)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    kinds = ["context", LOCAL, "window", "batch", "vocabulary", "width", "processes"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="what is changed; --out keeps the rest")
    parser.add_argument("--trials", type=int, default=2, help="number of trials")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed at each")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, a minute for each point")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--picture", type=Path, help="where to draw")
    options = parser.parse_args()
    found = measure(options.only, options.trials, options.steps, options.compile)
    if "processes" in options.only:
        with tempfile.TemporaryDirectory() as name:
            found += [processes(number, Path(name), options.trials) for number in (1, 2)]
    for point in found:
        memory = f"{point['peak_memory'] / 2**20:8,.0f} MiB" if point["peak_memory"] else ""
        print(
            f"{point['axis']:>25} {point['value']:>8,} {point['tokens_per_second']['median']:>12,.0f} tokens/s {memory}"
        )
    if options.out and options.out.exists():
        kept = json.loads(options.out.read_text(encoding="utf-8"))["points"]
        found = [*(point for point in kept if point["axis"] not in options.only), *found]
        found.sort(key=lambda point: kinds.index(point["axis"]))
    result = {"machine": machine(), "base": BASE, "compile": options.compile, "steps": options.steps, "points": found}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
