"""`gemmule evaluate MODEL --data FILE`: how well does it predict this text?"""

import json
from typing import Annotated

import typer

from gemmule.cli.screen import Screen, print_json


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, run folder, .gguf file or owner/name.")],
    data: Annotated[str, typer.Option(help="The SOURCE to predict: a file, folder, glob, hf:owner/name or storybook.")],
    documents: Annotated[int | None, typer.Option(min=1, help="Only the first so many documents.")] = None,
    separator: Annotated[str, typer.Option(help="What stands between documents of a .txt file.")] = "<|endoftext|>",
    column: Annotated[str, typer.Option(help="Where the text of JSONL, Parquet and hf: rows is.")] = "text",
    context: Annotated[
        int | None, typer.Option(min=1, help="Cut longer documents.  [default: longest document, up to 2048]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are predicted at once.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last.")] = False,
) -> None:
    """Measure how well a model predicts a text: nats per token, bits per byte, perplexity.

    Each document is predicted on its own, from its beginning to its end; bits per byte can be compared between
    models of different vocabularies.

    Examples:

        gemmule evaluate runs/story/model --data storybook:500

        gemmule evaluate runs/tinystories-cpu --data valid.txt --json
    """
    import gemmule
    from gemmule.data import DataSettings
    from gemmule.evaluate.text import score_text
    from gemmule.recipe import check_recipe

    options = {"train": data, "separator": separator, "column": column}
    settings = check_recipe(options, DataSettings, "of the options")
    network, tokenizer = gemmule.load(model, device)
    with Screen() as screen:
        result = score_text(network, tokenizer, settings, documents, context, batch_size, screen.progress)
    screen.say(
        f"{result['documents']:,} documents, {result['bytes']:,} bytes, {result['tokens']:,} tokens: "
        f"{result['loss']:.4f} nats per token, {result['bits_per_byte']:.4f} bits per byte, "
        f"perplexity {result['perplexity']:.2f}"
    )
    if as_json:
        print_json(json.dumps(result))
