"""`gemmule bench train|generate|prepare|load`: how fast, in how much memory, beside others."""

import importlib
import json
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.screen import Screen, print_json

if TYPE_CHECKING:
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
        Path | None, typer.Option(help="The shape to measure.  [default: 6.76M parameters, 32 x 256 tokens a step]")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="generate, load: a model folder.  [default: an untrained one of the shape]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="generate: tokens of one continuation.")] = 64,
    text: Annotated[Path | None, typer.Option(help="prepare: text to repeat and perturb.  [default: stories]")] = None,
    megabytes: Annotated[float, typer.Option(min=0.1, help="prepare: size of the corpus.")] = 100.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side has its turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help="What a side repeats its work for in each turn.")] = 10.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Repeat so often instead.")] = None,
    warmup: Annotated[int, typer.Option(min=1, help="Repetitions before that, which are not timed.")] = 3,
    litgpt_python: Annotated[
        str | None, typer.Option(envvar="LITGPT_PYTHON", help="An interpreter that has litgpt.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON object there, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with all figures last.")] = False,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure Gemmule side by side with others, in turn, each in a process of its own, and say the ratio.

    Peers of train: transformers, transformers-compiled, litgpt, litgpt-compiled, and our own gemmule-eager and
    gemmule-muon; of generate: transformers, llama.cpp, llama.cpp-q8_0; of load and prepare: transformers.

    Examples:

        gemmule bench train --peer transformers --peer transformers-compiled

        gemmule bench train --recipe recipes/tinystories-90m-seed.toml --set train.batch_size=8 --peer transformers

        gemmule bench generate --model runs/story/model --peer llama.cpp

        gemmule bench prepare --text train.txt --megabytes 1000 --peer transformers --rounds 1
    """
    if job is not None:  # a side of ours, which the command has started
        from gemmule.bench.stage import perform

        perform(_module(work).make, json.loads(job))
        return
    _check_peers(work, peers or [])
    from gemmule.bench.rounds import Effort

    effort, named = Effort(rounds, seconds, steps, warmup), peers or []
    with Screen() as screen, tempfile.TemporaryDirectory(prefix="gemmule-bench-") as name:
        folder = Path(name)
        if work == Work.TRAIN:
            shape = _recipe(recipe, overrides or [])
            found = _module(work).compare_training(shape, named, effort, litgpt_python, screen.progress)
        elif work == Work.PREPARE:
            found = _module(work).compare_preparing(text, megabytes, named, effort, folder, screen.progress)
        else:
            opened = model or _untrained(_recipe(recipe, overrides or []), folder / "model")
            if work == Work.LOAD:
                found = _module(work).compare_loading(opened, named, effort, screen.progress)
            else:
                found = _module(work).compare_generating(opened, tokens, named, effort, folder, screen.progress)
    for sentence in sentences(found):
        screen.say(sentence)
    if out is not None:
        from gemmule.files import written_aside

        with written_aside(out) as aside:
            aside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(json.dumps(found))


def _module(work: Work) -> Any:
    return importlib.import_module(f"gemmule.bench.{work}")


def _check_peers(work: Work, peers: list[str]) -> None:
    from gemmule.errors import PeerError

    known = list(_module(work).PEERS)
    for peer in peers:
        if peer not in known:
            raise PeerError(f"--peer {peer}: `bench {work}` compares with {', '.join(known)}")
    if len(set(peers)) < len(peers):
        raise PeerError(f"--peer {', '.join(peers)}: name each once")


def _recipe(path: Path | None, overrides: list[str]) -> "Recipe":
    """Read a recipe, or take the shape that is measured where none is named, and change it."""
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


def _untrained(recipe: "Recipe", folder: Path) -> Path:
    from gemmule.bench.models import write_untrained

    write_untrained(recipe, folder)
    return folder


# What is said of each kind of work: the figure, its unit, and how it is written.
FIGURES = {
    "train": ("tokens_per_second", "tokens/s", ",.0f"),
    "generate": ("tokens_per_second", "tokens/s", ",.1f"),
    "prepare": ("megabytes_per_second", "MB/s", ",.1f"),
    "load": ("seconds_to_first_token", "s to the first token", ".2f"),
}


def sentences(found: dict[str, Any]) -> list[str]:
    """Say a line for each side: median, quartiles, share of the limit, memory, ratio."""
    figure, unit, form = FIGURES[found["bench"]]
    lines = []
    for name, side in found["sides"].items():
        low, high = side[figure]["quartiles"]
        line = f"{name:>22}  {side[figure]['median']:{form}} {unit} ({low:{form}} to {high:{form}})"
        if "share_of_limit" in side:
            line += f", {side['share_of_limit']:.1%} of the limit"
        if side["peak_memory"]:
            line += f", {side['peak_memory'] / 2**20:,.0f} MiB"
        if name in found["ratios"]:
            line += f"; Gemmule is {found['ratios'][name]['median']:.2f} x as fast"
        lines.append(line)
    return lines
