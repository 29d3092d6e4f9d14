"""`gemmule prepare SOURCE...`: text to token shards that several runs can share."""

from pathlib import Path
from typing import Annotated

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
    vocab_size: Annotated[int, typer.Option(min=1, help="Tokens of the vocabulary to train.")] = 4096,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Use this tokenizer.json or folder instead of training one.")
    ] = None,
    separator: Annotated[str, typer.Option(help="What stands between documents of a .txt file.")] = "<|endoftext|>",
    column: Annotated[str, typer.Option(help="Where the text of JSONL, Parquet and hf: rows is.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as a JSON object last.")] = False,
) -> None:
    """Turn text into token shards that runs can share.

    A recipe uses them by data.train = "FOLDER".

    Examples:

        gemmule prepare letters/ diary.txt old.jsonl.gz --out data/mine

        gemmule prepare train.txt --validation valid.txt --out data/stories --vocab-size 8192

        gemmule prepare hf:roneneldan/TinyStories --out data/tinystories
    """
    from gemmule.data import DataSettings, prepare_dataset
    from gemmule.recipe import check_recipe
    from gemmule.tokenizer import TokenizerSettings

    chosen = {"train": source, "separator": separator, "column": column}
    settings = check_recipe(chosen | ({"validation": validation} if validation else {}), DataSettings, "of the options")
    vocabulary = {"path": str(tokenizer)} if tokenizer else {"vocab_size": vocab_size}
    with Screen() as screen:
        dataset = prepare_dataset(
            settings, check_recipe(vocabulary, TokenizerSettings, "of the options"), out, screen.progress
        )
    screen.say(f'{dataset.report}\nthe dataset is in {out}; a recipe uses it by  data.train = "{out}"')
    if as_json:
        print_json(dataset.report.model_dump_json())
