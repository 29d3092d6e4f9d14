"""`gemmule prepare SOURCE...`: clean, deduplicate and tokenize text into token shards."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.examples import show_examples
from gemmule.cli.screen import Screen, logged_to, note, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemmule.data.dataset import Dataset


_Kind = Annotated[
    str | None, typer.Option(help="What the rows are: text, conversations, preferences or prompts.  [default: text]")
]
_Show = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Print so many documents with the trained tokens marked, and write them to a page; SOURCE may be a "
        "dataset that is prepared already.",
    ),
]


def prepare(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, hf:owner/name[:split[:column]], storybook[:count], or - for standard input."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the dataset to create.")] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="SOURCE of the validation split; by default, documents are held out.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Vocabulary size of the tokenizer to train.  [default: 4096]")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Existing tokenizer.json, or a folder with one, instead of training a tokenizer."),
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Separator between documents in .txt files.  [default: <|endoftext|>]")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column with the text, in JSONL, CSV, Parquet and hf: sources.  [default: text]")
    ] = None,
    kind: _Kind = None,
    show: _Show = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="data.b=c", help="Override a setting, such as a filter; repeatable."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe to take the settings from; prints how many epochs it trains on the dataset."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of worker processes.  [default: up to the number of CPU cores]")
    ] = None,
    engine: Annotated[str, typer.Option(help="Executor: local processes, or a ray cluster (local, ray).")] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object at the end.")] = False,
) -> None:
    """Clean, deduplicate and tokenize text into a dataset of token shards.

    Recipes use it by data.train = "FOLDER". After an interruption, the same command resumes. Deterministic: the same
    bytes for any number of workers.

    Examples:

        gemmule prepare letters/ diary.txt old.jsonl.gz --out data/mine

        gemmule prepare train.txt --validation valid.txt --out data/stories --vocab-size 8192

        gemmule prepare hf:roneneldan/TinyStories --out data/tinystories --set data.near_duplicates=0.8

        gemmule prepare chats.jsonl --kind conversations --tokenizer runs/story/model --out data/chats --show 5

        gemmule prepare data/chats --show 5
    """
    from gemmule.data.engines import ENGINES

    if engine not in ENGINES:
        raise typer.BadParameter(f"{engine!r}: use {' or '.join(ENGINES)}", param_hint="--engine")
    if show is not None and out is None and _is_dataset(source):
        show_examples(Path(source[0]).expanduser(), show, as_json)
        return
    if out is None:
        raise typer.BadParameter("name the folder of the dataset to create", param_hint="--out")
    data = {"train": source, "validation": validation, "separator": separator, "column": column, "kind": kind}
    vocabulary = {"vocab_size": vocab_size, "path": str(tokenizer) if tokenizer else None}
    table = {"data": _given(data), "tokenizer": _given(vocabulary)}
    settings, training = _settings(table, overrides or [], recipe)
    with Screen() as screen, logged_to(screen):
        dataset = _prepare(settings, out, workers, engine, screen)
    _report(screen, dataset, out, training)
    if show is not None:
        show_examples(out, show, as_json)
    if as_json:
        print_json(dataset.report.model_dump(mode="json", exclude_none=True))


def _report(screen: Screen, dataset: "Dataset", out: Path, training: "Callable[[Dataset], str] | None") -> None:
    """Print what was read, how many epochs of it a recipe trains on, and how a recipe uses it."""
    from gemmule.data.prepare import PLOT_FILE

    screen.print(str(dataset.report))
    if training:
        screen.print(training(dataset))
    if not (out / PLOT_FILE).exists():
        screen.print(f"no {PLOT_FILE}: plots need matplotlib: pip install 'gemmule[plots]'")
    kind = "" if dataset.kind == "text" else f'  and  data.kind = "{dataset.kind}"'
    screen.print(f'dataset written to {out}; use it in a recipe by  data.train = "{out}"{kind}')


def _is_dataset(source: list[str]) -> bool:
    """Whether the SOURCEs are one prepared dataset."""
    from gemmule.data.dataset import DATASET_FILE

    return len(source) == 1 and (Path(source[0]).expanduser() / DATASET_FILE).is_file()


def _prepare(settings: Any, out: Path, workers: int | None, engine: str, screen: Screen) -> "Dataset":
    """Prepare the dataset; where this is interrupted or fails, report what is kept and how to resume."""
    from gemmule.data.dataset import DATASET_FILE
    from gemmule.data.prepare import prepare_dataset
    from gemmule.errors import OutputError
    from gemmule.files import partial_folder

    existed = (out / DATASET_FILE).exists()
    try:
        return prepare_dataset(settings.data, settings.tokenizer, out, screen.progress, workers=workers, engine=engine)
    except BaseException as error:
        if (out / DATASET_FILE).exists() and not existed:
            screen.print(f"the dataset in {out} is complete")
        elif partial_folder(out).is_dir() and not partial_folder(out).is_symlink():
            kept = f"finished work is kept in {partial_folder(out)}"
            resumable = isinstance(error, KeyboardInterrupt | OutputError)  # others would fail again the same way
            screen.print(
                f"{kept}; to resume:  {shlex.join(_command())}" if resumable else f"{kept} for the next attempt"
            )
        raise


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, [])}


def _command() -> list[str]:
    return ["gemmule", *sys.argv[1:]]


def _settings(table: dict[str, dict[str, Any]], overrides: list[str], recipe: Path | None) -> tuple[Any, Any]:
    """Return the settings of data and tokenizer, and a function that describes the epochs of a recipe."""
    from gemmule.data.settings import DataSettings
    from gemmule.settings import Settings, check_recipe, read_recipe
    from gemmule.tokenizer import TokenizerSettings

    class Preparation(Settings):
        """The settings of a preparation."""

        data: DataSettings
        tokenizer: TokenizerSettings = TokenizerSettings()

    if recipe is None:
        return check_recipe(table, Preparation, "of the options", overrides), None
    from gemmule.train.objectives import implied_epochs
    from gemmule.train.recipe import Recipe

    settings = read_recipe(recipe, Recipe, overrides, table, note)
    return settings, lambda dataset: f"{recipe}: {implied_epochs(dataset, settings)}"
