"""`gemmule trim MODEL --corpus SOURCE --out DIR`: the same model with the vocabulary that a corpus needs."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.options import AdapterOption
from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.cli.text_settings import text_settings
from gemmule.reading import local_path

if TYPE_CHECKING:
    from gemmule.data.settings import DataSettings
    from gemmule.data.sources import Split
    from gemmule.formats.trim import TrimmedModel
    from gemmule.model.gemma3 import Gemma3
    from gemmule.tokenizer import Tokenizer
    from gemmule.tokenizer.trim import EncodingComparison

_POSITIONS = 256  # at which logits are compared

SourceOption = Annotated[
    str, typer.Option(help="The SOURCE to keep the vocabulary of: a file, folder, glob, hf:owner/name, storybook, or -")
]
HeldOutOption = Annotated[
    str | None, typer.Option(help="Another SOURCE; prints how many more tokens it takes with the trimmed vocabulary.")
]


def trim(
    model: Annotated[
        str, typer.Argument(help="A model folder, run folder, .gguf file or owner/name of the Hugging Face Hub.")
    ],
    corpus: SourceOption,
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    size: Annotated[
        int | None, typer.Option(min=1, help="Number of ids to keep in all.  [default: what the corpus needs]")
    ] = None,
    min_count: Annotated[
        int, typer.Option(min=1, help="Drop ids that occur fewer times; documents with them are encoded differently.")
    ] = 1,
    held_out: HeldOutOption = None,
    separator: Annotated[
        str | None, typer.Option(help="Separator of the documents in a text file.  [default: as for training]")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the text.  [default: as for training]")] = None,
    adapter: AdapterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object at the end.")] = False,
) -> None:
    """Trim the vocabulary of a model to the ids that a corpus needs: the corpus is encoded and predicted as before.

    Embedding rows and merges of other ids are removed; other text is spelled in smaller pieces. Before the folder is
    written, every document of the corpus is encoded with both tokenizers, and logits of both models are compared.

    Examples:

        gemmule trim google/gemma-3-270m --corpus train.txt --out small

        gemmule trim google/gemma-3-270m --corpus train.txt --held-out valid.txt --size 16384 --out small
    """
    from gemmule.errors import OutputError
    from gemmule.formats.exports import output_exists
    from gemmule.formats.model_card import license_note, read_card
    from gemmule.formats.trim import save_trimmed
    from gemmule.model.finite import refuse_nonfinite_weights
    from gemmule.reading import require_utf8
    from gemmule.tokenizer.trim import check_trimmable
    from gemmule.train.opening import load_with_path

    require_utf8(out, lambda message: OutputError(f"--out {message}"))
    if output_exists(out):
        raise OutputError(f"--out {out}: already exists and is not empty; choose a new or empty folder")
    with Screen() as screen, logged_to(screen):
        sources: dict[Split, str | None] = {"train": corpus, "validation": held_out}
        texts = [
            _Text(screen, text_settings(local_path(model), source, separator, column)[0], split)
            for split, source in sources.items()
            if source is not None
        ]
        network, tokenizer, found = load_with_path(model, adapters=adapter or ())
        refuse_nonfinite_weights(network, model)
        check_trimmable(tokenizer)
        card = read_card(found)
        if note := license_note(card, model):
            screen.print(note)
        trimmed, figures = _trim(network, tokenizer, texts, size, min_count)
        name = card.name or local_path(model).name
        save_trimmed(trimmed, out, found, card, name, tokenizer.vocab_size)
        for sentence in _describe(figures, texts, min_count):
            screen.print(sentence)
        screen.print(f"wrote {out}; try it:  gemmule generate {out}")
    if as_json:
        print_json({"out": str(out), **figures})


class _Text:
    """The cleaned documents of a SOURCE, read several times."""

    def __init__(self, screen: Screen, settings: "DataSettings", split: "Split") -> None:
        from gemmule.data.dataset import prepared_folder
        from gemmule.errors import SourceError

        self.name = ", ".join(settings.train)
        self._screen, self._settings, self._split = screen, settings, split
        if folder := prepared_folder(settings):
            raise SourceError(f"{folder}: is a prepared dataset; name the text that it was made from")

    def read(self, label: str) -> Iterator[str]:
        """Yield the documents; SourceError where there are none."""
        from gemmule.data.report import describe_tally
        from gemmule.errors import SourceError
        from gemmule.evaluate.text import clean_texts

        documents, tally = 0, Counter[str]()
        for stored in clean_texts(self._settings, tally, self._split):
            documents += 1
            self._screen.progress(f"{label} {self.name}", documents, None)
            yield stored.text
        if not documents:
            dropped = describe_tally(tally) or "none there"
            raise SourceError(f"{self.name}: there is no text to keep a vocabulary of ({dropped})")


def _trim(
    model: "Gemma3", tokenizer: "Tokenizer", texts: list[_Text], size: int | None, min_count: int
) -> "tuple[TrimmedModel, dict[str, Any]]":
    """Return the trimmed model with the figures of its proof; GemmuleError where that fails."""
    from gemmule.errors import GemmuleError
    from gemmule.formats.trim import TrimmedModel, logits_are_equal, trim_model
    from gemmule.tokenizer.trim import choose_ids, compare_encodings, count_ids, trim_tokenizer

    corpus = texts[0]
    counts = count_ids(tokenizer, corpus.read("reading"))
    kept = choose_ids(tokenizer, counts, size, min_count)
    trimmed = TrimmedModel(trim_model(model, kept), trim_tokenizer(tokenizer, kept), kept)
    with _without_warnings_of_reading():
        both = tokenizer, trimmed.tokenizer, kept
        encoded = compare_encodings(*both, corpus.read("comparing"), _POSITIONS)
    held_out = compare_encodings(*both, texts[1].read("comparing")) if texts[1:] else None
    wrong = encoded.changed if min_count == 1 else encoded.wrong
    if wrong or (held_out and held_out.wrong):
        name, count = (corpus.name, wrong) if wrong else (texts[1].name, held_out.wrong if held_out else 0)
        raise GemmuleError(f"{name}: {count:,} documents would be encoded differently; nothing was written")
    if not logits_are_equal(model, trimmed, encoded.beginning):
        raise GemmuleError("the logits of the trimmed model differ from the model's; nothing was written")
    figures: dict[str, Any] = {
        "ids": len(kept),
        "ids_before": tokenizer.vocab_size,
        "parameters": sum(parameter.numel() for parameter in trimmed.model.parameters()),
        "parameters_before": sum(parameter.numel() for parameter in model.parameters()),
        "dropped": len(counts.keys() - set(kept)),
        "positions": len(encoded.beginning),
        "corpus": _figures(encoded),
        "held_out": _figures(held_out) if held_out else None,
    }
    return trimmed, figures


def _figures(encoded: "EncodingComparison") -> dict[str, int]:
    documents, changed, _, tokens, trimmed_tokens, _ = encoded
    return {"documents": documents, "changed": changed, "tokens_before": tokens, "tokens": trimmed_tokens}


def _describe(figures: dict[str, Any], texts: list[_Text], min_count: int) -> Iterator[str]:
    for name in ("ids", "parameters"):
        before, after = figures[f"{name}_before"], figures[name]
        yield f"{name}: {before:,} -> {after:,} ({after / before:.1%})"
    if min_count > 1:
        yield f"--min-count {min_count}: drops {figures['dropped']:,} ids that the corpus has"
    yield f"logits: equal at {figures['positions']:,} positions, to the last bit"
    for text, key in zip(texts, ("corpus", "held_out"), strict=False):
        documents, changed, before, after = figures[key].values()
        more = f"; tokens: {before:,} -> {after:,} ({after / before - 1:+.2%})" if key == "held_out" or changed else ""
        yield f"{text.name}: {changed:,} of {documents:,} documents are encoded differently{more}"


@contextmanager
def _without_warnings_of_reading() -> Iterator[None]:
    """Log nothing of a source that was read before."""
    logger = logging.getLogger("gemmule.data")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
