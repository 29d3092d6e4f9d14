"""`gemmule prepare SOURCE...`: text to token shards that several runs can share."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gemmule.cli.screen import Screen, print_json


def prepare(
    source: Annotated[
        list[str],
        typer.Argument(help="Each a file, folder, glob, hf:owner/name[:split[:column]] or storybook[:count]."),
    ],
    out: Annotated[Path, typer.Option(help="The dataset folder to make.")],
    validation: Annotated[
        list[str] | None, typer.Option(help="A SOURCE to validate on; without it, a part is held out.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the vocabulary to train.  [default: 4096]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Use this tokenizer.json or folder instead of training one.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="What stands between documents of a .txt file.  [default: <|endoftext|>]")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Where the text of JSONL, Parquet and hf: rows is.  [default: text]")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="data.b=c", help="Change one more setting, such as a filter.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Take settings from this recipe, and say how many epochs it implies.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes to use.  [default: all cores]")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as a JSON object last.")] = False,
) -> None:
    """Turn text into token shards that runs can share.

    A recipe uses them by data.train = "FOLDER". Stopped or killed, the same command goes on.

    Examples:

        gemmule prepare letters/ diary.txt old.jsonl.gz --out data/mine

        gemmule prepare train.txt --validation valid.txt --out data/stories --vocab-size 8192

        gemmule prepare hf:roneneldan/TinyStories --out data/tinystories --set data.near_duplicates=0.8
    """
    from gemmule.data.dataset import Dataset
    from gemmule.data.engines import ENGINES, available_cores
    from gemmule.data.prepare import PICTURE_FILE, prepare_dataset
    from gemmule.files import aside_of

    if engine not in ENGINES:
        raise typer.BadParameter(f"{engine!r}: use {' or '.join(ENGINES)}", param_hint="--engine")
    given = {"train": source, "validation": validation, "separator": separator, "column": column}
    vocabulary = {"vocab_size": vocab_size, "path": str(tokenizer) if tokenizer else None}
    table = {"data": _set(given), "tokenizer": _set(vocabulary)}
    settings, training = _settings(table, overrides or [], recipe)
    with Screen() as screen:
        try:
            dataset: Dataset = prepare_dataset(
                settings.data,
                settings.tokenizer,
                out,
                screen.progress,
                workers=workers or available_cores(),
                engine=engine,
                say=screen.say,
            )
        except BaseException:
            if aside_of(out).exists():
                screen.say(f"what is finished is kept in {aside_of(out)}; to go on:  {shlex.join(_command())}")
            raise
    screen.say(str(dataset.report))
    if training:
        screen.say(training(dataset))
    if not (out / PICTURE_FILE).exists():
        screen.say(f"no {PICTURE_FILE}: drawing needs matplotlib: pip install 'gemmule[plots]'")
    screen.say(f'the dataset is in {out}; a recipe uses it by  data.train = "{out}"')
    if as_json:
        print_json(dataset.report.model_dump_json())


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value}


def _command() -> list[str]:
    return ["gemmule", *sys.argv[1:]]


def _settings(table: dict[str, dict[str, Any]], overrides: list[str], recipe: Path | None) -> tuple[Any, Any]:
    """Return the settings of data and tokenizer, and what says the epochs of a recipe."""
    from gemmule.data.settings import DataSettings
    from gemmule.recipe import Settings, apply_override, check_recipe, read_recipe
    from gemmule.tokenizer import TokenizerSettings

    class Preparation(Settings):
        """What is prepared."""

        data: DataSettings
        tokenizer: TokenizerSettings = TokenizerSettings()

    if recipe is None:
        for override in overrides:
            apply_override(table, override)
        return check_recipe(table, Preparation, "of the options"), None
    from gemmule.train.run import Recipe, implied_epochs

    base = read_recipe(recipe, Recipe, overrides)
    merged = {name: base.model_dump(exclude_unset=True).get(name, {}) | given for name, given in table.items()}
    settings = check_recipe(merged, Preparation, str(recipe))
    whole = base.replace(data=settings.data)
    return settings, lambda dataset: f"{recipe}: {implied_epochs(dataset, whole)}"
