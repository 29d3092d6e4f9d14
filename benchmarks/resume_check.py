"""Fault injection: does a run that is killed and resumed equal an uninterrupted one, bit for bit?

    python benchmarks/resume_check.py recipes/story.toml --set train.compile=false
    python benchmarks/resume_check.py recipes/story.toml --steps 100 --kills 20 --json

Trains the first steps of a recipe twice in a temporary folder, the second time under `kill -9` at random times and
during checkpoints, and compares weights, optimizer state, metrics and samples. Exit code 0 where all are equal, else 1.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gemmule.errors import GemmuleError
from gemmule.settings import read_recipe
from gemmule.train.recipe import Recipe
from harness import resume
from harness.command import number_from


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and print its verdict; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe to check")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override a key")
    parser.add_argument("--steps", type=number_from(int, 2), default=30, help="number of steps (default: 30)")
    parser.add_argument("--kills", type=number_from(int, 1), default=5, help="number of kills (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the verdict as a JSON object last")
    options = parser.parse_args(arguments)
    try:
        recipe = read_recipe(options.recipe, Recipe, options.overrides, warn=_log)
        short = resume.shortened(recipe, options.steps, options.kills)
        with tempfile.TemporaryDirectory(prefix="gemmule-resume-") as folder:
            verdict = resume.resume_check(short, Path(folder), options.kills, options.seed, _log)
    except GemmuleError as error:
        _log(str(error))
        return error.exit_code
    if verdict.differences:
        _log(f"not equal: {'; '.join(verdict.differences)} differ")
    else:
        _log(
            f"equal: after {verdict.steps} steps and {len(verdict.kills)} kills, {verdict.while_saving} of them "
            "during a checkpoint, weights, optimizer state, metrics and samples are the same bits"
        )
    if options.json:
        print(json.dumps(verdict._asdict() | {"same": not verdict.differences}))
    return int(bool(verdict.differences))


def _log(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
