"""The command line of the comparative benchmarks: python benchmarks/WORK.py [--peer NAME]... [--json]."""

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmule.errors import GemmuleError

if TYPE_CHECKING:
    from gemmule.train.recipe import Recipe

INTERRUPTED = 130  # 128 and the number of SIGINT

# Of each benchmark: its figure, the unit, the format.
FIGURES = {
    "train": ("tokens_per_second", "tokens/s", ",.0f"),
    "engine": ("tokens_per_second", "tokens/s", ",.0f"),
    "prepare": ("megabytes_per_second", "MB/s", ",.1f"),
    "evaluate": ("tokens_per_second", "tokens/s", ",.0f"),
    "load": ("seconds_to_first_token", "s to the first token", ".2f"),
}


def number_from(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    """Return the type of an option: a finite number of a kind, not below `least`."""

    def parse(text: str) -> float:
        number = kind(text)
        if not math.isfinite(number) or number < least:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
        return number

    return parse


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring, with the options of every benchmark that writes JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write the JSON object to")
    parser.add_argument("--json", action="store_true", help="print the JSON object last")
    return parser


def parser_of(work: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of one comparative benchmark."""
    parser = base_parser(description)
    peers = list(importlib.import_module(f"harness.{work}").PEERS)
    parser.add_argument(
        "--peer", dest="peers", action="append", default=[], choices=peers, help="peer to compare with; may be repeated"
    )
    count, positive = number_from(int, 1), number_from(float, 0)
    parser.add_argument("--trials", type=count, default=3, help="number of trials (default: 3)")
    parser.add_argument("--seconds", type=positive, default=10.0, help="measured seconds per trial (default: 10)")
    parser.add_argument("--steps", type=count, help="measured repetitions per trial, instead of --seconds")
    parser.add_argument("--warmup", type=count, default=3, help="warmup repetitions per trial (default: 3)")
    if work != "prepare":
        parser.add_argument("--recipe", type=Path, help="recipe of the model's shape (default: 6.76M parameters)")
        parser.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="change one setting"
        )
    if work in ("engine", "evaluate", "load"):
        parser.add_argument("--model", type=Path, help="model folder (default: randomly initialized)")
    if work == "engine":
        from gemmule.inference.runners import DECODINGS

        natural = number_from(int, 0)
        parser.add_argument("--tokens", type=count, default=200, help="number of new tokens (default: 200)")
        parser.add_argument("--rows", type=count, default=16, help="sequences that are decoded together (default: 16)")
        parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
        parser.add_argument("--decoding", choices=DECODINGS, default="auto", help="decoding of Gemmule")
        parser.add_argument("--device", default="cpu", help="device of Gemmule and transformers")
        parser.add_argument("--long", type=natural, default=0, help="tokens of a prompt during which gaps are measured")
        parser.add_argument("--replies", type=natural, default=0, help="replies compared alone and in a crowd")
    if work == "evaluate":
        parser.add_argument("--documents", type=count, default=200, help="number of stories (default: 200)")
    if work == "train":
        interpreter = os.environ.get("LITGPT_PYTHON")
        parser.add_argument(
            "--litgpt-python", default=interpreter, help="interpreter that has litgpt (default: LITGPT_PYTHON)"
        )
    if work == "prepare":
        parser.add_argument("--text", type=Path, help="text to repeat and perturb (default: the storybook)")
        parser.add_argument("--megabytes", type=number_from(float, 0.1), default=100.0, help="size of the corpus")
        parser.add_argument("--kills", type=number_from(int, 0), default=0, help="kill -9 and resume so many times")
    return parser


def main(work: str, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its figures; return the exit code."""
    from harness.backends import PeerError

    options = parser_of(work, description).parse_args(arguments)
    try:
        if len(set(options.peers)) < len(options.peers):
            raise PeerError(f"--peer {', '.join(options.peers)}: name each once")
        found = _compare(work, options)
    except GemmuleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    for line in table(found):
        print(line, file=sys.stderr)
    report(found, options)
    return 0


def report(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Write the JSON object of a benchmark to --out, and print it with --json."""
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(found))


def show_progress(label: str, done: int, total: int | None) -> None:
    """Print a line of progress to standard error."""
    print(f"{label} ({done} of {total} done)" if total else label, file=sys.stderr)


def _compare(work: str, options: argparse.Namespace) -> dict[str, Any]:
    import harness.engine
    import harness.evaluate
    import harness.load
    import harness.models
    import harness.prepare
    import harness.train
    from harness.trials import Budget

    budget = Budget(options.trials, options.seconds, options.steps, options.warmup)
    with tempfile.TemporaryDirectory(prefix="gemmule-bench-") as name:
        folder = Path(name)
        if work == "prepare":
            return harness.prepare.compare_preparing(
                options.text, options.megabytes, options.peers, budget, folder, show_progress, options.kills
            )
        if work == "train":
            recipe = _recipe(options.recipe, options.overrides)
            return harness.train.compare_training(recipe, options.peers, budget, options.litgpt_python, show_progress)
        model = options.model
        if model is None:
            model = folder / "model"
            harness.models.write_untrained(_recipe(options.recipe, options.overrides), model)
        if work == "load":
            return harness.load.compare_loading(model, options.peers, budget, show_progress)
        if work == "evaluate":
            return harness.evaluate.compare_evaluating(
                model, options.documents, options.peers, budget, folder, show_progress
            )
        return harness.engine.compare_engines(model, options.peers, budget, folder, show_progress, vars(options))


def _recipe(path: Path | None, overrides: list[str]) -> "Recipe":
    """Read a recipe, by default that of the 6.76M shape, with overrides."""
    from gemmule.settings import check_recipe, read_recipe
    from gemmule.train.recipe import Recipe
    from harness.train import DEFAULT

    if path is not None:
        return read_recipe(path, Recipe, overrides, warn=_note)
    return check_recipe(DEFAULT, Recipe, "of the benchmark", overrides, warn=_note)


def _note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr)


def table(found: dict[str, Any]) -> list[str]:
    """Return a line per backend: median, quartiles, share of the limit, peak memory, speedup."""
    figure, unit, form = FIGURES[found["bench"]]
    lines = []
    for name, backend in found["backends"].items():
        low, high = backend[figure]["quartiles"]
        line = f"{name:>22}  {backend[figure]['median']:{form}} {unit} ({low:{form}} to {high:{form}})"
        if "share_of_limit" in backend:
            line += f", {backend['share_of_limit']:.1%} of the limit"
        if backend["peak_memory"]:
            line += f", {backend['peak_memory'] / 2**20:,.0f} MiB"
        if name in found["ratios"]:
            line += f"; Gemmule is {found['ratios'][name]['median']:.2f} x as fast"
        lines.append(line)
    return lines
