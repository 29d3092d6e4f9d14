"""`gemmule bench train|generate|prepare|load`: how fast, in how much memory, beside others."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.screen import Screen, print_json

if TYPE_CHECKING:
    from gemmule.bench.rounds import Effort
    from gemmule.train.run import Recipe


class Work(StrEnum):
    """What is measured."""

    TRAIN = "train"
    GENERATE = "generate"
    PREPARE = "prepare"
    LOAD = "load"


def bench(
    work: Annotated[Work, typer.Argument(help="What is measured.")],
    peers: Annotated[list[str] | None, typer.Option("--peer", help="What to compare with; may be repeated.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The shape to train.  [default: 6.76M parameters, 32 x 256 tokens a step]")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side has its turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help="What a side repeats its work for in each turn.")] = 10.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Repeat so often instead.")] = None,
    litgpt_python: Annotated[
        str | None, typer.Option(envvar="LITGPT_PYTHON", help="An interpreter that has litgpt.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON object there, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with all figures last.")] = False,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure Gemmule side by side with others, in turn, each in a process of its own, and say the ratio.

    Examples:

        gemmule bench train --peer transformers --peer transformers-compiled

        gemmule bench train --recipe recipes/tinystories-90m-seed.toml --set train.batch_size=8 --peer transformers
    """
    if job is not None:  # a side of ours, started by the command
        _perform(work, json.loads(job))
        return
    from gemmule.bench.rounds import Effort

    effort = Effort(rounds, seconds, steps)
    with Screen() as screen:
        found = _train(_recipe(recipe, overrides or []), peers or [], effort, litgpt_python, screen)
    for sentence in _sentences(found):
        screen.say(sentence)
    if out is not None:
        from gemmule.files import written_aside

        with written_aside(out) as aside:
            aside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(json.dumps(found))


def _perform(work: Work, job: dict[str, Any]) -> None:
    from gemmule.bench import train
    from gemmule.bench.stage import perform

    perform({Work.TRAIN: train.make}[work], job)


def _recipe(path: Path | None, overrides: list[str]) -> "Recipe":
    from copy import deepcopy

    from gemmule.bench.train import DEFAULT
    from gemmule.recipe import apply_override, check_recipe, read_recipe
    from gemmule.train.run import Recipe

    if path is not None:
        return read_recipe(path, Recipe, overrides)
    table = deepcopy(DEFAULT)
    for override in overrides:
        apply_override(table, override)
    return check_recipe(table, Recipe, "of the benchmark")


def _train(
    recipe: "Recipe", peers: list[str], effort: "Effort", litgpt_python: str | None, screen: Screen
) -> dict[str, Any]:
    from gemmule.bench.train import compare_training

    return compare_training(recipe, peers, effort, litgpt_python, screen.progress)


def _sentences(found: dict[str, Any]) -> list[str]:
    """Say a line for each side."""
    lines = []
    for name, side in found["sides"].items():
        rate = side["tokens_per_second"]
        low, high = rate["quartiles"]
        line = f"{name:>22}  {rate['median']:9,.0f} tokens/s ({low:,.0f} to {high:,.0f})"
        line += f"  {side['share_of_limit']:5.1%} of the limit"
        if side["peak_memory"] is not None:
            line += f"  {side['peak_memory'] / 2**20:7,.0f} MiB"
        if name in found["ratios"]:
            line += f"  Gemmule is {found['ratios'][name]['median']:.2f} x as fast"
        lines.append(line)
    return lines
