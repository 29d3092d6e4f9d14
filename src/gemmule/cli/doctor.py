"""`gemmule doctor MODEL`: check a model's files, weights and config."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemmule.cli.options import AdapterOption
from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.cli.text_settings import text_settings
from gemmule.reading import local_path
from gemmule.run_folder import run_of

if TYPE_CHECKING:
    from gemmule.data.settings import DataSettings


def doctor(
    model: Annotated[
        str, typer.Argument(help="A model folder, run folder (its newest good checkpoint), .gguf file or owner/name.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="A SOURCE of text that the model should predict well.  [default: built-in English text and stories, "
            "and the validation documents of a run]"
        ),
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Separator of the documents in a text file.  [default: the run's]")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the text.  [default: the run's]")] = None,
    adapter: AdapterOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Check a model's weights, tokenizer and config; exit code 0 if all checks passed, 1 if one failed.

    The loss on text must be lower than that of a unigram model. Then plausible mistakes are tried on the model in
    memory: other RoPE bases and factors, other windows, gate and up exchanged, norms without the 1 ... Where one
    predicts the text clearly better, the config or the conversion is wrong, and the key or tensor is named.

    Examples:

        gemmule doctor runs/story/model

        gemmule doctor google/gemma-3-270m --data wiki.txt --json
    """
    from gemmule.evaluate.doctor import ModelUnderTest, examine, read_declared
    from gemmule.train.opening import load_with_path

    settings, dataset = _text(local_path(model), data, separator, column)
    with Screen() as screen, logged_to(screen):
        network, tokenizer, found = load_with_path(model, device, adapters=adapter or ())
        test = ModelUnderTest(network.float(), tokenizer, read_declared(found), settings, dataset)
        findings = examine(test, screen.progress)
    failed = [finding.name for finding in findings if finding.verdict == "failed"]
    if as_json:
        print_json({"passed": not failed, "findings": [finding._asdict() for finding in findings]})
    else:
        for finding in findings:
            typer.echo(f"{finding.verdict:8}{finding.name:21}{finding.sentence}")
        typer.echo(f"{model} failed: {', '.join(failed)}" if failed else f"{model} passed")
    if failed:
        raise typer.Exit(1)


def _text(
    model: Path, data: str | None, separator: str | None, column: str | None
) -> "tuple[DataSettings | None, Path | None]":
    """Return how the given text is read; without one, the prepared dataset of the run that the model is of."""
    from gemmule.data.dataset import DATASET_FILE, prepared_folder
    from gemmule.errors import RecipeError

    if data is not None:
        return text_settings(model, data, separator, column)[0], None
    if separator or column:
        raise RecipeError("--separator, --column: say how the text of --data is read; name that, too")
    run = run_of(model)
    if run is None:
        return None, None
    dataset = prepared_folder(text_settings(model, None, None, None)[0]) or run.data
    return None, dataset if (dataset / DATASET_FILE).is_file() else None
