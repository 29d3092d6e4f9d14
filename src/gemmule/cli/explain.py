"""`gemmule explain MODEL [MODEL] --text T`: where a model is surprised by a text, and what it computes on the way."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemmule.cli.options import AdapterOption, adapters_of_one
from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.errors import OutputError, SourceError, UserError
from gemmule.reading import path_kind

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from gemmule.evaluate.explain import Comparison, Explanation

# Terminal colors of 256 for tokens from so many bits on, light to dark red; ink that is legible on each.
_COLORS = ((0.5, "black on 230"), (2, "black on 223"), (4, "black on 216"), (8, "black on 209"), (12, "white on 160"))
_LISTED = 8


def explain(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL [MODEL]", help="A model folder, run folder, .gguf file or owner/name; or two."),
    ],
    text: Annotated[str | None, typer.Option(help="The text to explain, at most 1,024 tokens.")] = None,
    file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text, instead of --text.")] = None,
    out: Annotated[Path | None, typer.Option(help="The HTML page to write; without it the summary is all.")] = None,
    adapter: AdapterOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last.")] = False,
) -> None:
    """Explain what a model makes of a text: surprise, likeliest alternatives, logit lens, attention, tensors.

    The terminal shows the text colored by surprise. The page, one file that loads nothing, adds the likeliest tokens at
    each place, the logit lens of every layer, what each head looked at, and the range of every tensor of the forward
    pass. Two models are compared on the text, token by token, or by the smallest common spans where their tokenizers
    differ.

    Examples:

        gemmule explain runs/story --text "Once upon a time, there was a clever badger." --out badger.html

        gemmule explain runs/story/checkpoints/step-00000100 runs/story --file story.txt --out before-after.html
    """
    from gemmule.evaluate.explain import Comparison, Explanation, compare
    from gemmule.evaluate.explain import as_json as plain

    if len(models) > 2:
        raise UserError(f"MODEL: {len(models)} are given; one is explained, or two are compared")
    adapters, given = adapters_of_one(adapter, models), read_text(text, file)
    if out is not None and (out.is_symlink() or path_kind(out, OutputError)):
        raise OutputError(f"--out {out}: already exists; choose a new file")
    with Screen() as screen, logged_to(screen):
        explanations: list[Explanation] = []
        for model in models:
            screen.progress(f"reading with {model}", 0, None)
            explanations.append(_explain(model, device, given, adapters))
    comparison: Comparison | None = compare(*explanations) if len(explanations) == 2 else None
    values = [plain(each) for each in explanations]
    difference = None if comparison is None else plain(comparison)
    if out is not None:
        from gemmule.files import atomic_write
        from gemmule.report.explain_page import explanation_page

        page = explanation_page(values, difference)
        with atomic_write(out) as temporary:
            temporary.write_text(page, encoding="utf-8")
    _show(explanations, comparison, out, as_json)
    if as_json:
        print_json({"text": given, "models": values, "comparison": difference})


def read_text(text: str | None, file: Path | None) -> str:
    """Return the text of the options; SourceError where it cannot be read or is empty, UserError where both are given.

    A file's last line break is not part of it.
    """
    if (text is None) == (file is None):
        raise UserError("--text, --file: name the text by one of them")
    source = "--text" if file is None else f"--file {file}"
    try:
        if file is None:
            assert text is not None
            given = text.encode("utf-8", "surrogateescape").decode("utf-8")  # bytes that the locale could not decode
        elif path_kind(file, SourceError) is None:
            raise SourceError(f"{source}: no such file")
        else:
            given = file.read_bytes().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeError as error:
        raise SourceError(f"{source}: not UTF-8 text ({error.reason}, at {error.start})") from None  # type: ignore[attr-defined]
    except OSError as error:
        raise SourceError(f"{source}: cannot be read: {error.strerror}") from None
    if not given:
        raise SourceError(f"{source}: the text is empty; give a sentence or more")
    return given


def _explain(model: str, device: str, text: str, adapters: tuple[str, ...]) -> "Explanation":
    import gemmule
    from gemmule.evaluate.explain import explain as explanation_of
    from gemmule.model.finite import refuse_nonfinite_weights

    network, tokenizer = gemmule.load(model, device, adapters)
    refuse_nonfinite_weights(network, model)
    return explanation_of(network.float(), tokenizer, text, model)


def _show(explanations: "list[Explanation]", comparison: "Comparison | None", out: Path | None, as_json: bool) -> None:
    """Print each text colored by surprise, the most surprising tokens, and the difference of two models."""
    from rich.console import Console

    console = Console(stderr=as_json, highlight=False, emoji=False)
    for each in explanations:
        per_byte = "" if each.bits_per_byte is None else f", {each.bits_per_byte:.3f} bits per byte"
        summary = f"{len(each.tokens):,} tokens, {each.bits:,.1f} bits, {each.bits_per_token:.3f} per token{per_byte}"
        console.print(f"{each.model}: {summary}", markup=False, soft_wrap=True)
        console.print(_colored(each))
        _list_surprises(console, each)
    if comparison is not None:
        console.print(_difference(explanations, comparison), markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"page: {out}", markup=False, soft_wrap=True)


def _colored(explanation: "Explanation") -> "Text":
    from rich.text import Text

    text = Text()
    for token in explanation.tokens:
        if not token.bytes:
            continue
        shown = "".join(
            character if character.isprintable() or character == "\n" else "\ufffd" for character in token.text
        )
        text.append(shown, next((color for limit, color in _COLORS[::-1] if (token.bits or 0) >= limit), ""))
    return text


def _list_surprises(console: "Console", explanation: "Explanation") -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title="Most surprising", title_justify="left", title_style="bold")
    table.add_column("bits", justify="right")
    table.add_column("token")
    table.add_column("expected", overflow="fold")
    predicted = [token for token in explanation.tokens if token.bits is not None]
    for token in sorted(predicted, key=lambda token: -(token.bits or 0))[:_LISTED]:
        likeliest = ", ".join(f"{each.text!r} {each.probability:.0%}" for each in token.alternatives[:3])
        table.add_row(f"{token.bits:.2f}", _plain(repr(token.text)), _plain(likeliest))
    console.print(table)


def _plain(text: str) -> "Text":
    from rich.text import Text

    return Text(text)


def _difference(explanations: "list[Explanation]", comparison: "Comparison") -> str:
    names = [each.model for each in explanations]
    one, other = comparison.one_bits, comparison.other_bits
    sentence = f"{names[0]} needs {one:,.1f} bits, {names[1]} {other:,.1f}: {other - one:+,.1f}"
    if comparison.same_tokenizer:
        return sentence
    pieces = f"{len(comparison.spans):,} common spans" if comparison.spans else "their totals"
    return f"{sentence} (their tokenizers differ: compared by {pieces})"
