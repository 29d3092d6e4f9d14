"""`gemmule doctor MODEL`: what is wrong with this model?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from gemmule.cli.screen import Screen, print_json


def doctor(
    model: Annotated[str, typer.Argument(help="A model folder, or a run folder (its newest good checkpoint).")],
    data: Annotated[str | None, typer.Option(help="A SOURCE of text that the model should predict well.")] = None,
    separator: Annotated[str, typer.Option(help="What stands between documents of a .txt file.")] = "<|endoftext|>",
    column: Annotated[str, typer.Option(help="Where the text of JSONL, Parquet and hf: rows is.")] = "text",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Find out what is wrong with a model; ends with 0 when it is well and with 1 when it is ill.

    Each check measures one thing that makes a Gemma 3: causality, window, rotary angles, norms, special tokens ...
    Faults that are consistent, such as weights of another config, show only in the loss of a text: give --data.

    Examples:

        gemmule doctor runs/story/model

        gemmule doctor runs/story --data storybook:100 --json
    """
    import gemmule
    from gemmule.data import DataSettings
    from gemmule.evaluate.doctor import Patient, examine, read_declared
    from gemmule.recipe import check_recipe

    options = {"train": data, "separator": separator, "column": column}
    settings = None if data is None else check_recipe(options, DataSettings, "of the options")
    network, tokenizer = gemmule.load(model, device)
    patient = Patient(network.float(), tokenizer, read_declared(_folder(Path(model))), settings)
    with Screen() as screen:
        findings = examine(patient, screen.progress)
    ill = [finding.name for finding in findings if finding.verdict == "ill"]
    if as_json:
        print_json(json.dumps({"well": not ill, "findings": [finding._asdict() for finding in findings]}))
    else:
        for finding in findings:
            typer.echo(f"{finding.verdict:8}{finding.name:19}{finding.sentence}")
        typer.echo(f"{model} is ill: {', '.join(ill)}" if ill else f"{model} is well")
    if ill:
        raise typer.Exit(1)


def _folder(model: Path) -> Path:
    """Return the folder with the model's files: a run folder's newest good checkpoint, or what was named."""
    from gemmule.train.checkpoint import newest_checkpoint

    is_run = (model / "recipe.toml").exists() and not (model / "config.json").exists()
    return newest_checkpoint(model)[0] or model if is_run else model
