"""The runs to which the rule of `gemmule grow` is fitted: many shapes, lengths and sizes of text.

    python benchmarks/scaling_runs.py --train train.txt --validation valid.txt --jobs 2

Each run trains on the beginning of the training text, or on the storybook, for a fixed number of steps, so that its
result does not depend on the speed of the machine. Bits per byte are those of the first 400 KB of the validation
text, at the end and at the best validation. Runs that benchmarks/results/scaling_runs.json has already are
not repeated; each result is added when it comes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from gemmule.data.dataset import open_dataset
from gemmule.grow.law import Run, fit
from gemmule.grow.shapes import block_parameters, shape
from gemmule.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/scaling_runs.json"


class Case(NamedTuple):
    """One run."""

    corpus: str  # KB of the training text, or a SOURCE of the storybook
    width: int
    layers: int
    vocab_size: int
    steps: int
    batch_size: int = 32
    context: int = 256
    dropout: float = 0.0
    learning_rate: float = 0.01
    adamw_learning_rate: float = 0.01
    weight_decay: float = 0.1
    seed: int = 0


TINY, SMALL, MEDIUM, BASE, WIDE, DEEP = (96, 3), (128, 4), (192, 4), (256, 4), (384, 4), (256, 8)
STORYBOOK = "storybook:20000"


def cases() -> list[Case]:
    """Return the runs, the most useful first."""
    found = [Case("15000", *size, 4096, steps) for steps, size in product((75, 150, 300), (SMALL, MEDIUM, BASE))]
    found += [
        Case("200", *size, 1024, steps, dropout=dropout)
        for size, steps, dropout in product((TINY, SMALL), (50, 100, 200), (0.0, 0.2))
    ]
    found += [
        Case("2000", *size, 2048, steps, dropout=dropout)
        for size, steps, dropout in product((SMALL, BASE), (100, 200, 400), (0.0, 0.1))
    ]
    found += [Case("15000", *BASE, entries, 150) for entries in (2048, 8192)]
    found += [Case("15000", *size, 4096, 150) for size in (WIDE, DEEP)]
    found += [Case("15000", *SMALL, entries, 150) for entries in (1024, 2048)]
    found += [Case(STORYBOOK, *size, 512, steps) for size, steps in product((TINY, SMALL, BASE), (75, 150))]
    found += [Case("15000", *BASE, 4096, 300, batch_size=16), Case("15000", *BASE, 4096, 75, batch_size=64)]
    return found


def trained(case: Case, data: Path, threads: int) -> dict[str, Any]:
    """Train, and return the case with its results."""
    config = shape(case.width, case.layers, case.vocab_size).model_dump(exclude_unset=True)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        settings = {
            "data.train": str(data), "data.validation": "none", "tokenizer.vocab_size": case.vocab_size,
            **{f"model.{name}": value for name, value in config.items() if name != "vocab_size"},
            "model.dropout": case.dropout, "train.minutes": "none", "train.steps": case.steps,
            "train.batch_size": case.batch_size, "train.context": case.context, "train.seed": case.seed,
            "train.validate_every": max(25, case.steps // 8), "train.checkpoint_every": 100_000,
            "train.sample_tokens": 1, "train.validation_tokens": "none",
            "train.compile": "false", "train.attention": "block-local", "optimizer.weight_decay": case.weight_decay,
            "optimizer.learning_rate": case.learning_rate, "optimizer.adamw_learning_rate": case.adamw_learning_rate,
        }  # fmt: skip
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        recipe = ROOT / "recipes/tinystories-cpu.toml"
        command = [sys.executable, "-m", "gemmule", "train", str(recipe), *options, "--out", str(run.path)]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{case}: {done.stderr[-2000:]}")
        lines = run.read_metrics()
        report = open_dataset(data, verify=False).report.train
        scores = {line["step"]: line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line}
        best = min(scores, key=scores.__getitem__)
    return {
        **case._asdict(), "bytes": report.bytes, "tokens": report.tokens,
        "train_loss": lines[-1]["loss"], "bits_per_byte": scores[case.steps], "best": scores[best], "best_step": best,
    }  # fmt: skip


def prepared(case: Case, train: Path, validation: Path, folder: Path) -> Path:
    """Return the dataset of a case, prepared where it is not there yet."""
    out = folder / f"{case.corpus.replace(':', '-')}-{case.vocab_size}"
    if not out.exists():
        if case.corpus.isdigit():
            source, held_out = folder / f"{case.corpus}.txt", folder / "valid.txt"
            write_beginning(train, source, int(case.corpus))
            write_beginning(validation, held_out, 400)
            sources = [str(source), "--validation", str(held_out)]
        else:
            sources = [case.corpus, "--validation", "storybook:500"]
        command = [sys.executable, "-m", "gemmule", "prepare", *sources]
        command += ["--out", str(out), "--vocab-size", str(case.vocab_size)]
        subprocess.run(command, check=True, capture_output=True)
    return out


def print_fit(rows: list[dict[str, Any]]) -> None:
    """Fit the law, and print its constants and how far each run is from it."""
    runs = best_runs(rows)
    found = fit(runs)
    print(found.law, found.floors, f"error {found.error:.4f}", sep="\n")
    for run in runs:
        predicted = found.law.loss(run.parameters, run.vocab_size, run.seen, run.unique) + found.floors[run.corpus]
        print(f"{run.bits_per_byte:.4f} {predicted - run.bits_per_byte:+.4f} {run}")


def best_runs(rows: list[dict[str, Any]]) -> list[Run]:
    """Return the results to fit: of runs that differ in dropout or batch alone, the best."""
    best: dict[Any, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["best"]):
        best[row["corpus"], row["width"], row["layers"], row["vocab_size"], row["steps"] * row["batch_size"]] = row
    return [as_run(row) for row in best.values()]


def as_run(row: dict[str, Any]) -> Run:
    """Return a result as the fit takes it."""
    parameters = block_parameters(shape(row["width"], row["layers"], row["vocab_size"]))
    seen = row["best_step"] * row["batch_size"] * row["context"] * row["bytes"] / row["tokens"]
    return Run(row["corpus"], parameters, row["vocab_size"], seen, row["bytes"], row["best"])


def write_beginning(text: Path, out: Path, kilobytes: int) -> None:
    """Write the whole stories in the first kilobytes of a text."""
    beginning = text.read_bytes()[: 1000 * kilobytes]
    out.write_bytes(beginning[: beginning.rindex(b"<|endoftext|>")])


def main() -> None:
    """Run what is missing, and keep each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--corpus", help="only the runs of this corpus, such as 200")
    parser.add_argument("--most", type=int, default=1000, help="at most so many runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--fit", action="store_true", help="fit the law of gemmule grow to the results, and run nothing"
    )
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    if options.fit:
        print_fit(rows)
        return
    if options.train is None or options.validation is None:
        parser.error("--train and --validation are needed, or --fit")
    known = {Case(*(row[name] for name in Case._fields)) for row in rows}
    missing = [case for case in cases() if case not in known]
    missing = [case for case in missing if options.corpus in (None, case.corpus)]
    lock = Lock()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(case: Case) -> None:
            with lock:
                data = prepared(case, options.train, options.validation, folder)
            row = trained(case, data, threads=1)
            with lock:
                rows.append(row)
                options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
                print(f"{case}: {row['bits_per_byte']:.4f}, best {row['best']:.4f} at {row['best_step']}", flush=True)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(run, missing[: options.most]))


if __name__ == "__main__":
    main()
