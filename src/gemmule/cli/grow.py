"""`gemmule grow SOURCE...`: a model of one's own text; everything is chosen, with a reason for each setting."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.options import finite
from gemmule.cli.screen import Screen, logged_to, note, print_json
from gemmule.cli.train import follow
from gemmule.errors import OutputError, UserError
from gemmule.run_folder import RunFolder

if TYPE_CHECKING:
    from gemmule.data.dataset import Dataset
    from gemmule.grow.choose import Budget, Choice
    from gemmule.grow.machine import Speed
    from gemmule.train.recipe import Recipe

_NOTE = "Chosen by `gemmule grow`. A recipe like any other: edit it, and train with `gemmule train`."


def grow(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, hf:owner/name[:split[:column]], storybook[:count], or - for standard input; "
            "or one run folder, which is trained longer."
        ),
    ],
    minutes: Annotated[float, typer.Option(min=0.05, max=100_000, callback=finite, help="Minutes of training.")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="The run folder.  [default: runs/NAME-OF-SOURCE]")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N", help="Parameters, such as 5m; by default the rule chooses.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Continue the weights of a run folder, model folder, .gguf or owner/name."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Stop after the recipe is written.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="Set one setting yourself; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with the result last.")] = False,
) -> None:
    """Train a model on your own text: vocabulary, shape, rates and length are chosen, each with its reason.

    Reads the text, measures this machine, writes recipe.toml into the run folder, and trains.

    Examples:

        gemmule grow letters/ diary.txt

        gemmule grow books.jsonl.gz --minutes 60 --out runs/books

        gemmule grow notes/ --start google/gemma-3-270m

        gemmule grow runs/letters --minutes 5
    """
    _check_single_process()
    if finished := _run_to_extend(source):
        _extend(finished, minutes, as_json)
        return
    run = RunFolder(out or Path("runs") / _name_of(source[0]))
    _check_free(run)
    _check_names(overrides or [])
    budget = _budget(minutes, size)
    with Screen() as screen, logged_to(screen):
        if start is None:
            recipe = _plan_from_scratch(source, run, budget, overrides or [], screen)
        else:
            recipe = _plan_from_model(source, run, start, budget, overrides or [], screen)
        screen.print(f"recipe: {run.recipe}, with the reasons")
    again = shlex.join(["gemmule", "train", str(run.recipe), "--out", str(run.path), "--resume"])
    if plan:
        typer.echo(f"train it by:  {again}", err=True)
        return
    summary = follow(recipe, run, again, resume=True)
    if summary is None:
        return
    _say_what_was_memorized(run)
    _say_what_is_next(run)
    if as_json:
        print_json(summary)


def _check_single_process() -> None:
    """Raise UserError under torchrun: what is chosen is for one process."""
    from gemmule.distributed import launch_environment

    if launch_environment() is not None:
        raise UserError(
            "gemmule grow plans for one process; write the recipe with --plan, and give that to "
            "torchrun ... -m gemmule train"
        )


def _run_to_extend(source: Sequence[str]) -> RunFolder | None:
    run = RunFolder(Path(source[0]))
    return run if len(source) == 1 and run.recipe.is_file() and run.metrics.is_file() else None


def _extend(run: RunFolder, minutes: float, as_json: bool) -> None:
    """Train a finished run longer."""
    from gemmule.settings import read_recipe
    from gemmule.train.open_run import Extension
    from gemmule.train.recipe import Recipe

    again = shlex.join(["gemmule", "train", str(run.recipe), "--out", str(run.path), "--resume"])
    summary = follow(read_recipe(run.recipe, Recipe, warn=note), run, again, longer=Extension(minutes=minutes))
    if summary is not None and as_json:
        print_json(summary)


def _check_free(run: RunFolder) -> None:
    """Raise OutputError where the folder has a run already, and name what could be done with it."""
    if not run.metrics.is_file():
        return
    path = shlex.quote(str(run.path))
    raise OutputError(
        f"--out {run.path}: holds a run already; resume it with gemmule train {path}/recipe.toml --out {path} "
        f"--resume, train it longer with gemmule grow {path}, continue it on other text with gemmule grow SOURCE "
        f"--start {path} --out NEW, or name another folder"
    )


def _check_names(overrides: Sequence[str]) -> None:
    """Raise RecipeError for settings that do not exist, before the text is read."""
    from gemmule.fields import find_field
    from gemmule.settings import check_recipe
    from gemmule.train.recipe import Recipe

    unknown = [each for each in overrides if not find_field(Recipe, each.partition("=")[0].strip().split("."))]
    check_recipe({"data": {"train": "text"}, "train": {"steps": 1}}, Recipe, "of --set", unknown)


def _name_of(source: str) -> str:
    """Return the name of a run for a SOURCE."""
    last = re.split(r"[/:]", source.rstrip("/"))[-1] or source
    stem = last.partition(".")[0] if not last.startswith(".") else last
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "grown"


def _budget(minutes: float, size: str | None) -> "Budget":
    from gemmule.grow.choose import Budget

    if size is None:
        return Budget(minutes)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmb]?)", size.strip().lower())
    parameters = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2]] if found else 0
    if not 1 <= parameters <= 1e12:
        raise UserError(f"--size {size}: write a number of parameters, such as 500k, 5m or 5000000")
    return Budget(minutes, int(parameters))


def _plan_from_scratch(
    sources: Sequence[str], run: RunFolder, budget: "Budget", overrides: Sequence[str], screen: Screen
) -> "Recipe":
    """Prepare the text, choose a recipe for it and for this machine, and write it with the reasons."""
    from gemmule.grow.choose import choose, choose_vocabulary
    from gemmule.grow.machine import measure
    from gemmule.runtime import choose_device
    from gemmule.tokenizer import TokenizerSettings

    screen.progress("measuring this machine", 0, None)
    speed = measure(choose_device("auto"))
    reasons: dict[str, str] = {}

    def vocabulary(text_bytes: int) -> TokenizerSettings:
        vocab_size, reasons["tokenizer.vocab_size"] = choose_vocabulary(text_bytes, budget, speed)
        return TokenizerSettings(vocab_size=vocab_size)

    data, why = _data_settings(sources)
    dataset = _prepared(data, vocabulary, run, overrides, screen)
    choice = choose(dataset.report.train, dataset.tokenizer.vocab_size, budget, speed)
    choice.reasons.update(reasons, **why)
    choice.table["tokenizer"] = {"vocab_size": dataset.tokenizer.vocab_size}
    screen.print(str(dataset.report))
    return _write(choice, data, dataset, speed, run, overrides, screen)


def _plan_from_model(
    sources: Sequence[str], run: RunFolder, start: str, budget: "Budget", overrides: Sequence[str], screen: Screen
) -> "Recipe":
    """Prepare the text with the tokenizer of a model, and choose how the model learns it."""
    from gemmule.grow.choose import choose_continuation
    from gemmule.grow.machine import measure
    from gemmule.runtime import choose_device
    from gemmule.train.opening import load_with_path

    if budget.parameters is not None:
        raise UserError("--size: has no effect beside --start, whose model has a size; leave it out")
    model, tokenizer, _ = load_with_path(start)
    speed = measure(choose_device("auto"))
    data, why = _data_settings(sources)
    dataset = _prepared(data, tokenizer, run, overrides, screen)
    choice = choose_continuation(model.config, dataset.report.train, budget, speed)
    choice.reasons.update(why)
    choice.table["train"]["start"] = start
    screen.print(str(dataset.report))
    return _write(choice, data, dataset, speed, run, overrides, screen)


def _data_settings(sources: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of the data and their reasons."""
    from gemmule.grow.choose import holdout_for
    from gemmule.grow.source import size_of

    size = size_of(sources)
    data = {"train": list(sources), "holdout": holdout_for(size or 10**9), "mask_documents": True}
    reasons = {
        "data.holdout": "50 KB of the text, between 1 and 10 %",
        "data.mask_documents": "attention does not cross documents, as in generation",
    }
    return data, reasons


def _prepared(
    data: dict[str, Any], vocabulary: Any, run: RunFolder, overrides: Sequence[str], screen: Screen
) -> "Dataset":
    """Prepare the text in the run folder, or open what an earlier call has prepared there."""
    from gemmule.data.dataset import DATASET_FILE, open_dataset
    from gemmule.data.prepare import prepare_dataset
    from gemmule.data.settings import DataSettings
    from gemmule.settings import Settings, check_recipe

    class Data(Settings):
        data: DataSettings

    own = [change for change in overrides if change.startswith("data.")]
    settings = check_recipe({"data": data}, Data, "of the options", own).data
    if (run.data / DATASET_FILE).is_file():
        screen.print(f"{run.data}: was prepared before and is used; remove it to read the text again")
        return open_dataset(run.data)
    return prepare_dataset(settings, vocabulary, run.data, screen.progress, workers=None)


def _write(
    choice: "Choice",
    data: dict[str, Any],
    dataset: "Dataset",
    speed: "Speed",
    run: RunFolder,
    overrides: Sequence[str],
    screen: Screen,
) -> "Recipe":
    """Check the recipe, write it with its reasons, and show them."""
    from gemmule.fields import toml_value
    from gemmule.files import atomic_write
    from gemmule.grow.source import choose_prompts
    from gemmule.settings import check_recipe, write_recipe
    from gemmule.train.recipe import Recipe

    table = {"data": data, **choice.table}
    if prompts := choose_prompts(dataset):
        table["train"]["sample_prompts"] = prompts
        choice.reasons["train.sample_prompts"] = "beginnings of held-out documents"
    recipe = check_recipe(table, Recipe, "chosen by grow", overrides)
    for sentence in choice.warnings:
        screen.print(f"warning: {sentence}")
    screen.print(str(speed))
    for section in ("data", "tokenizer", "model", "train", "optimizer", "schedule"):
        for key, reason in choice.reasons.items():
            if key.startswith(f"{section}."):
                value = toml_value(getattr(getattr(recipe, section), key.removeprefix(f"{section}.")))
                screen.print(f"  {key} = {value}: {reason}")
    run.path.mkdir(parents=True, exist_ok=True)
    with atomic_write(run.recipe) as temporary:
        write_recipe(recipe, temporary, _NOTE, given_only=True, comments=choice.reasons)
    return recipe


def _say_what_was_memorized(run: RunFolder) -> None:
    from gemmule.evaluate.memorization import memorization_of_run

    with Screen() as screen, logged_to(screen):
        screen.print(str(memorization_of_run(run, screen.progress)))


def _say_what_is_next(run: RunFolder) -> None:
    path = shlex.quote(str(run.path))
    for command, purpose in (
        (f"gemmule serve {path}", "talk to it in a browser"),
        (f"gemmule report {path}", "one page with curves, samples and figures"),
        (f"gemmule export {path} --to gguf --out {path}.gguf", "take it to llama.cpp, Ollama and others"),
        (f"gemmule grow {path} --minutes 10", "train it longer"),
    ):
        typer.echo(f"  {command:<60} {purpose}", err=True)
