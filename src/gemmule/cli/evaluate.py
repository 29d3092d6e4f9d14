"""`gemmule evaluate MODEL --data FILE`: loss, bits per byte and perplexity on a text."""

import math
from typing import Annotated, Any

import typer

from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.cli.text_settings import text_settings
from gemmule.reading import local_path


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, run folder, .gguf file or owner/name.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="The SOURCE to score: a file, folder, glob, hf:owner/name, storybook, or - for standard input; "
            "or a prepared dataset, whose validation documents are scored.  [default: those of the run]"
        ),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Number of documents, from the first.  [default: all]")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Separator of the documents in a text file.  [default: the run's]")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the text.  [default: the run's]")] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Sequence length; longer documents are cut.  [default: longest document, up to 2048]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences per batch.  [default: 32,768 tokens]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last.")] = False,
) -> None:
    """Measure the loss of a model on a text: nats per token, bits per byte, perplexity.

    The text is cleaned as for training. Each document is scored on its own, from its first token to its last; bits per
    byte can be compared between models of different vocabularies. Of a run folder, the run's own validation documents
    are scored where --data names nothing else, and its own settings say how text is read.

    Examples:

        gemmule evaluate runs/story

        gemmule evaluate runs/story/model --data storybook:500

        gemmule evaluate runs/tinystories-cpu --data valid.txt --json
    """
    import gemmule
    from gemmule.data.dataset import prepared_folder
    from gemmule.errors import GemmuleError, RecipeError
    from gemmule.evaluate.text import score_dataset, score_text

    settings, run = text_settings(local_path(model), data, separator, column)
    prepared = prepared_folder(settings) or (run.data if run and data is None else None)
    if prepared and (separator or column):
        raise RecipeError(f"--separator, --column: {prepared} is prepared, its text was read already; leave them out")
    with Screen() as screen, logged_to(screen):
        network, tokenizer, _ = gemmule.load_with_path(model, device)
        if network.embedding.weight.device.type == "cpu":
            network = network.float()  # that of a folder in bf16, too
        options: tuple[Any, ...] = (documents, context, batch_size, screen.progress)
        if prepared is None:
            result = score_text(network, tokenizer, settings, *options)
        else:
            screen.print(f"the validation documents of {prepared}:")
            result = score_dataset(network, tokenizer, prepared, *options)
    if not math.isfinite(result["loss"]):
        raise GemmuleError(
            f"{model}: the loss is {result['loss']}, not a number; gemmule doctor {model} says what is wrong"
        )
    screen.print(_sentence(result))
    if as_json:
        print_json(result)


def _sentence(result: dict[str, Any]) -> str:
    from gemmule.data.report import counted

    counts = ", ".join(
        (counted(result["documents"], "document"), f"{result['bytes']:,} bytes", f"{result['tokens']:,} tokens")
    )
    bits = result["bits_per_byte"]
    measures = [f"{result['loss']:.4f} nats per token", *([f"{bits:.4f} bits per byte"] if bits is not None else [])]
    return f"{counts}: {', '.join(measures)}, perplexity {result['perplexity']:.2f}"
