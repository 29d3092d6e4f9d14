"""`gemmule prepare --show`: examples of a prepared dataset, with the trained tokens in color, and their page."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gemmule.cli.training_display import printable

if TYPE_CHECKING:
    from rich.console import Console

    from gemmule.data.dataset import Dataset
    from gemmule.report.examples_page import Example

PAGE = "examples.html"


def show_examples(folder: Path, count: int, to_errors: bool) -> None:
    """Print documents of the dataset in a folder, spread evenly over it, and write them to a page there."""
    from rich.console import Console

    from gemmule.data.dataset import open_dataset
    from gemmule.files import as_output_error, atomic_write
    from gemmule.report.examples_page import examples_page

    dataset = open_dataset(folder)
    examples = list(_examples(dataset, count))
    console = Console(stderr=to_errors, highlight=False, emoji=False, soft_wrap=True)
    for example in examples:
        _print(console, example)
    reports = {"train": dataset.report.train, "validation": dataset.report.validation}
    summary = [f"{name}: {split.loss_mask}" for name, split in reports.items() if split.loss_mask is not None]
    page = folder / PAGE
    with as_output_error(page), atomic_write(page) as temporary:
        temporary.write_text(examples_page(str(folder), summary, examples), encoding="utf-8")
    console.print(f"page: {page}", markup=False)


def _examples(dataset: "Dataset", count: int) -> "Iterator[Example]":
    from gemmule.data.loss_mask import segments
    from gemmule.report.examples_page import Example, ShownSegment

    corpus, tokenizer = dataset.train, dataset.tokenizer
    count = min(count, corpus.documents)
    for document in (number * corpus.documents // count for number in range(count)):
        shown = (
            ShownSegment(each.role, each.trained, tokenizer.decode(each.ids, specials=True), len(each.ids))
            for each in segments(corpus, document, tokenizer)
        )
        yield Example(f"Document {document:,} of {corpus.documents:,}", tuple(shown))


def _print(console: "Console", example: "Example") -> None:
    """Print a document: trained tokens in color, or in double brackets where there is none."""
    from rich.text import Text

    text = Text.assemble((f"{example.title}: {example.counts}\n", "bold"))
    for segment in example.segments:
        shown = printable(segment.text)
        if not segment.trained:
            text.append(shown, "dim" if segment.role == "template" else "")
        elif console.color_system is None:
            text.append(f"[[{shown}]]")
        else:
            text.append(shown, "black on green")
    console.print(text)
