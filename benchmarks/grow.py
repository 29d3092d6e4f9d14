"""Is what `gemmule grow` chooses as good as the best of many recipes made by hand, in the same minutes?

    python benchmarks/grow.py --train train.txt --validation valid.txt

Four texts (200 KB, 2 MB and 15 MB of the training text, and a storybook) are grown in two and in ten minutes of
training. Beside it stand thirteen recipes: tinystories-cpu.toml as it is, and with other vocabularies, shapes, batches
and dropout. All are judged by the bits per byte of their final model on the same held-out text (400 KB of the
validation text, or other stories of the storybook). Nine hours in all, one run at a time, with all cores: results that
benchmarks/results/grow.json has already are not repeated, each is added when it comes, and --corpus, --minutes and
--most take a part. Seconds count from the start of the command to its end, compilation included. A row
is only compared with others of the same --machine.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness.trials import machine
from plan import gemmule
from scaling_runs import write_beginning

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/grow.json"
CORPORA = ("200", "2000", "15000", "storybook:20000")
MINUTES = (2.0, 10.0)
GROW = "gemmule grow"


def shape(width: int, layers: int, heads: int, vocabulary: int = 4096) -> tuple[str, ...]:
    """Return the settings of another shape, whose MLP is three times as wide as its blocks."""
    return (
        f"model.hidden_size={width}", f"model.intermediate_size={3 * width}", f"model.num_hidden_layers={layers}",
        f"model.sliding_window_pattern={layers if layers <= 4 else layers // 2}",
        f"model.num_attention_heads={heads}", f"tokenizer.vocab_size={vocabulary}",
    )  # fmt: skip


BY_HAND: dict[str, tuple[str, ...]] = {
    "tinystories-cpu.toml": (),
    "vocabulary 1,024": ("tokenizer.vocab_size=1024",),
    "vocabulary 2,048": ("tokenizer.vocab_size=2048",),
    "vocabulary 8,192": ("tokenizer.vocab_size=8192",),
    "3 layers": ("model.num_hidden_layers=3", "model.sliding_window_pattern=3"),
    "6 layers": ("model.num_hidden_layers=6", "model.sliding_window_pattern=3"),
    "width 384": shape(384, 4, 6),
    "width 192": shape(192, 4, 3),
    "width 128, 3 layers, vocabulary 2,048": shape(128, 3, 2, 2048),
    "16 rows": ("train.batch_size=16",),
    "dropout 0.1": ("model.dropout=0.1",),
    "dropout 0.2, width 192, vocabulary 1,024": ("model.dropout=0.2", *shape(192, 4, 3, 1024)),
    "dropout 0.2, width 128, vocabulary 1,024": ("model.dropout=0.2", *shape(128, 3, 2, 1024)),
}


class Case(NamedTuple):
    """One run."""

    corpus: str  # KB of the training text, or a SOURCE of the storybook
    minutes: float
    recipe: str  # a name of BY_HAND, or "gemmule grow"


def cases(corpus: str | None, minutes: float | None) -> Iterator[Case]:
    """Yield the runs, those of `gemmule grow` first, so that a part of the table has what it compares."""
    for each in MINUTES if minutes is None else (minutes,):
        for text in CORPORA if corpus is None else (corpus,):
            for recipe in (GROW, *BY_HAND):
                yield Case(text, each, recipe)


def sources(corpus: str, options: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Return the SOURCE of training and of held-out text, written where they are parts of files."""
    if not corpus.isdigit():
        return corpus, "storybook:500"
    train, held_out = folder / f"{corpus}.txt", folder / "held-out.txt"
    if not train.exists():
        write_beginning(options.train, train, int(corpus))
        write_beginning(options.validation, held_out, 400)
    return str(train), str(held_out)


def measured(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, and return the case with its results."""
    train, held_out = sources(case.corpus, options, folder)
    with tempfile.TemporaryDirectory() as name:
        run, began = Path(name) / "run", time.perf_counter()
        if case.recipe == GROW:
            gemmule("grow", train, "--minutes", case.minutes, "--out", run)
        else:
            changes = (
                f"data.train={train}", f"data.validation={held_out}", f"train.minutes={case.minutes}",
                *BY_HAND[case.recipe],
            )  # fmt: skip
            recipe = ROOT / "recipes/tinystories-cpu.toml"
            gemmule("train", recipe, "--out", run, *(part for each in changes for part in ("--set", each)))
        seconds = time.perf_counter() - began
        answer = gemmule("evaluate", run / "model", "--data", held_out, "--json").splitlines()[-1]
    bits = float(json.loads(answer)["bits_per_byte"])
    return {**case._asdict(), "machine": options.machine, "bits_per_byte": bits, "seconds": round(seconds, 1)}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print for each machine, text and budget: what was grown, the best recipe made by hand, the shipped one."""
    print("| machine | text | minutes | grown | best by hand | of | tinystories-cpu.toml | grown / best |")
    print("|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, str, float], dict[str, float]] = {}
    for row in rows:
        found = groups.setdefault((row["machine"], row["corpus"], row["minutes"]), {})
        found[row["recipe"]] = row["bits_per_byte"]
    for (name, corpus, minutes), found in groups.items():
        by_hand = {recipe: bits for recipe, bits in found.items() if recipe != GROW}
        if GROW not in found or not by_hand:
            continue
        best = min(by_hand, key=by_hand.__getitem__)
        shipped = by_hand.get("tinystories-cpu.toml", float("nan"))
        print(
            f"| {name} | {corpus} | {minutes:g} | {found[GROW]:.4f} | {by_hand[best]:.4f} ({best}) "
            f"| {len(by_hand)} | {shipped:.4f} | {found[GROW] / by_hand[best]:.3f} |"
        )


def main() -> None:
    """Run what is missing, and keep each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--corpus", help=f"only this one of {', '.join(CORPORA)}")
    parser.add_argument("--minutes", type=float, help="only runs of so many minutes")
    parser.add_argument("--machine", default=machine()["cpu"], help="name of this machine (default: %(default)s)")
    parser.add_argument("--most", type=int, default=1000, help="at most so many runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of the results, and run nothing")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    if not options.table:
        if options.train is None or options.validation is None:
            parser.error("--train and --validation are needed, or --table")
        here = [row for row in rows if row["machine"] == options.machine]
        known = {Case(row["corpus"], row["minutes"], row["recipe"]) for row in here}
        missing = [case for case in cases(options.corpus, options.minutes) if case not in known]
        with tempfile.TemporaryDirectory() as folder:
            for case in missing[: options.most]:
                row = measured(case, options, Path(folder))
                rows.append(row)
                options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
                print(f"{case}: {row['bits_per_byte']:.4f} in {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
