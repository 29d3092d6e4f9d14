"""`gemmule grow SOURCE...`: a model of one's own text; everything is chosen, with a reason for each setting."""

import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.options import finite, refuse_others
from gemmule.cli.screen import Screen, logged_to, note, print_json
from gemmule.cli.train import command_to_resume, follow
from gemmule.errors import OutputError, UserError
from gemmule.run_folder import RunFolder

if TYPE_CHECKING:
    from gemmule.data.dataset import Dataset
    from gemmule.grow.choose import Budget, Choice
    from gemmule.grow.machine import Speed
    from gemmule.train.recipe import Recipe

_NOTE = "Chosen by `gemmule grow`. A recipe like any other: edit it, and train with `gemmule train`."


def grow(
    context: typer.Context,
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
    from gemmule.data.dataset import open_dataset

    _check_single_process()
    if finished := _run_to_extend(source):
        refuse_others(context, f"{source[0]}, a run to train longer,", {"source", "minutes", "as_json"})
        _extend(finished, minutes, as_json)
        return
    run = RunFolder(out or Path("runs") / _name_of(source[0]))
    _check_free(run)
    _check_settings(overrides or [])
    budget = _budget(minutes, size)
    with Screen() as screen, logged_to(screen), _nothing_left_behind(run):
        if start is None:
            recipe = _plan_from_scratch(source, run, budget, overrides or [], screen)
        else:
            recipe = _plan_from_model(source, run, start, budget, overrides or [], screen)
        screen.print(f"recipe: {run.recipe}, with the reasons")
    again = command_to_resume(run.recipe, run, [], [])
    if plan:
        typer.echo(f"{open_dataset(run.data, verify=False).report}\ntrain it by:  {again}", err=True)
        if as_json:
            print_json({"run": str(run.path), "recipe": str(run.recipe)})
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
    from gemmule.train.open_run import Extension, stopped_early
    from gemmule.train.recipe import Recipe

    recipe, lines = read_recipe(run.recipe, Recipe, warn=note), run.read_metrics()
    step = lines[-1]["step"] if lines else 0
    again = command_to_resume(run.recipe, run, [], [])
    if step < recipe.train.steps and stopped_early(run, recipe) is None:
        raise UserError(
            f"{run.path}: a run that has not ended, after step {step:,} of {recipe.train.steps:,}; finish it first by "
            f"{again}"
        )
    summary = follow(recipe, run, again, longer=Extension(minutes=minutes))
    if summary is not None and as_json:
        print_json(summary)


def _check_free(run: RunFolder) -> None:
    """Raise OutputError where the folder has a run, and say what could be done with it, or has other files.

    What an earlier plan has left there, a recipe and its data, is planned anew.
    """
    if run.path.exists() and not run.path.is_dir():
        raise OutputError(f"--out {run.path}: is a file; name a new or empty folder")
    names = run.names() if run.path.exists() else set()
    if run.metrics.name in names:
        path = shlex.quote(str(run.path))
        raise OutputError(
            f"--out {run.path}: holds a run already; resume it with gemmule train {path}/recipe.toml --out {path} "
            f"--resume, train it longer with gemmule grow {path}, continue it on other text with gemmule grow SOURCE "
            f"--start {path} --out NEW, or name another folder"
        )
    if names and (names - {run.recipe.name, run.data.name} or not _is_plan(run)):
        from gemmule.train.open_run import not_a_run

        raise not_a_run(run.path)
    shutil.rmtree(run.data, ignore_errors=True)


def _is_plan(run: RunFolder) -> bool:
    """Whether a folder has a recipe of `gemmule grow` that was not followed yet, and no data but what that prepared."""
    from gemmule.data.dataset import DATASET_FILE

    try:
        written = run.recipe.read_text(encoding="utf-8").startswith(f"# {_NOTE}")
    except (OSError, UnicodeDecodeError):
        return False
    return written and (not run.data.exists() or (run.data / DATASET_FILE).is_file())


@contextmanager
def _nothing_left_behind(run: RunFolder) -> Iterator[None]:
    """Where planning fails, remove what it has made; what a preparation can resume from stays."""
    try:
        yield
    except BaseException:
        if not run.recipe.is_file():
            shutil.rmtree(run.data, ignore_errors=True)
            with suppress(OSError):  # it is not empty, or not there
                run.path.rmdir()
        raise


def _check_settings(overrides: Sequence[str]) -> None:
    """Raise RecipeError for settings that do not exist, UserError for the text, before any is read."""
    from gemmule.fields import find_field
    from gemmule.settings import check_recipe
    from gemmule.train.recipe import Recipe

    keys = {each: _key_of(each) for each in overrides}
    unknown = [each for each, key in keys.items() if not find_field(Recipe, key.split("."))]
    check_recipe({"data": {"train": "text"}, "train": {"steps": 1}}, Recipe, "of --set", unknown)
    if "data.train" in keys.values():
        raise UserError("--set data.train: the text is what SOURCE names; leave the setting out")


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip()


def _name_of(source: str) -> str:
    """Return the name of a run for a SOURCE."""
    parts = [part for part in re.split(r"[/:]", source) if part and not set(part) & set("*?[")]
    last = parts[-1] if parts else source
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

    data, why = _data_settings(sources)
    screen.progress("measuring this machine", 0, None)
    speed = measure(choose_device("auto"))
    reasons: dict[str, str] = {}

    def vocabulary(text_bytes: int) -> TokenizerSettings:
        vocab_size, reasons["tokenizer.vocab_size"] = choose_vocabulary(text_bytes, budget, speed)
        return TokenizerSettings(vocab_size=vocab_size)

    dataset = _prepared(data, vocabulary, run, overrides, screen)
    choice = choose(dataset.report.train, dataset.tokenizer.vocab_size, budget, speed)
    choice.reasons.update(reasons, **why)
    choice.table["tokenizer"] = {"vocab_size": dataset.tokenizer.vocab_size}
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
    data, why = _data_settings(sources)
    model, tokenizer, _ = load_with_path(start)
    speed = measure(choose_device("auto"))
    dataset = _prepared(data, tokenizer, run, overrides, screen)
    choice = choose_continuation(model.config, dataset.report.train, budget, speed)
    choice.reasons.update(why)
    choice.table["train"]["start"] = start
    return _write(choice, data, dataset, speed, run, overrides, screen)


def _data_settings(sources: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of the data and their reasons."""
    from gemmule.grow.choose import holdout_for
    from gemmule.grow.source import size_of

    holdout, reason = holdout_for(size_of(sources))
    data = {"train": list(sources), "holdout": holdout, "mask_documents": True}
    reasons = {
        "data.holdout": reason,
        "data.mask_documents": "attention does not cross documents, as in generation",
    }
    return data, reasons


def _prepared(
    data: dict[str, Any], vocabulary: Any, run: RunFolder, overrides: Sequence[str], screen: Screen
) -> "Dataset":
    """Prepare the text in the run folder."""
    from gemmule.data.prepare import prepare_dataset
    from gemmule.data.settings import DataSettings
    from gemmule.settings import Settings, check_recipe

    class Data(Settings):
        data: DataSettings

    own = [change for change in overrides if _key_of(change).startswith("data.")]
    settings = check_recipe({"data": data}, Data, "of the options", own).data
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
    choice.reasons.update((_key_of(override), "set by --set") for override in overrides)
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
