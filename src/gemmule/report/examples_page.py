"""The page of `gemmule prepare --show`: documents of a dataset, with what is trained on marked."""

from collections.abc import Sequence
from typing import NamedTuple

from gemmule.report.html import render_page


class ShownSegment(NamedTuple):
    """Consecutive tokens of one role, as text."""

    role: str
    trained: bool
    text: str
    tokens: int

    @property
    def title(self) -> str:
        """What a pointer over it says."""
        return f"{self.role}: {self.tokens:,} tokens, {'trained' if self.trained else 'read only'}"


class Example(NamedTuple):
    """A document of a dataset."""

    title: str
    segments: tuple[ShownSegment, ...]

    @property
    def counts(self) -> str:
        """How many tokens of how many are trained."""
        trained = sum(segment.tokens for segment in self.segments if segment.trained)
        return f"{trained:,} of {sum(segment.tokens for segment in self.segments):,} tokens are trained"


def examples_page(folder: str, summary: Sequence[str], examples: Sequence[Example]) -> str:
    """Return the page of some documents, below lines about all of them."""
    return render_page(
        "examples.html",
        f"What is learned from {folder}",
        styles=("page.css", "examples.css"),
        folder=folder,
        summary=summary,
        examples=examples,
    )
