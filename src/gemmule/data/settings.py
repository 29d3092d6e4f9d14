"""The settings of the data: what is read, what of it is kept, and how it is divided and mixed."""

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gemmule.recipe import Problem, Settings


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# One SOURCE, or several that are read one after the other.
Sources = Annotated[tuple[str, ...], Field(min_length=1, strict=False), BeforeValidator(_listed)]
Weights = Annotated[tuple[float, ...], Field(min_length=1, strict=False)]


class DataSettings(Settings):
    """What to train and validate on.

    A SOURCE is a file, a folder, a glob, hf:owner/name[:split[:column]], hf:owner/name/FILE, storybook[:count[:start]],
    or a folder that `gemmule prepare` made, which brings its own validation documents.
    """

    train: Sources = Field(description="the SOURCE to train on, or a list of several")
    validation: Sources | None = Field(
        None, description="the SOURCE to validate on, or a list; without it, train documents are held out"
    )
    weights: Weights | None = Field(
        None,
        description="the share of the training tokens that each SOURCE gives, such as [3, 1]; without it, all of each",
    )
    holdout: float = Field(0.01, description="share of the train documents to hold out where validation is not set")
    separator: str = Field("<|endoftext|>", description="what stands between the documents of a .txt file")
    column: str = Field("text", description="where the text of .jsonl, .parquet and hf: rows is")
    min_characters: int = Field(0, description="drop documents that are shorter")
    max_characters: int | None = Field(None, description="drop documents that are longer")
    keep_matching: str | None = Field(None, description="drop documents in which this regular expression finds nothing")
    drop_matching: str | None = Field(
        None, description="drop documents in which this regular expression finds something"
    )
    quality: bool = Field(False, description="drop what looks like tables, keys, markup, boilerplate or loops")
    near_duplicates: float | None = Field(
        None,
        description="drop documents this similar to an earlier or validation one: 0.8 is sensible, 1 the strictest",
    )
    mask_documents: bool = Field(False, description="whether a token sees its own document only")

    def problems(self) -> Iterator[Problem]:
        """Yield values that leave nothing to train or validate on, or that cannot work."""
        if self.validation is None and not 0 < self.holdout < 1:
            yield Problem("holdout", self.holdout, "must lie between 0 and 1, such as 0.01; or set data.validation")
        if not self.separator:
            yield Problem("separator", self.separator, 'must not be empty; "\\n\\n" would separate paragraphs')
        if self.max_characters is not None and self.max_characters < max(1, self.min_characters):
            advice = f"leaves no document; use more than min_characters ({self.min_characters})"
            yield Problem("max_characters", self.max_characters, advice)
        if self.near_duplicates is not None and not 0.6 <= self.near_duplicates <= 1:
            yield Problem("near_duplicates", self.near_duplicates, "must lie between 0.6 and 1, such as 0.8")
        for name in ("keep_matching", "drop_matching"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                yield Problem(name, getattr(self, name), f"is not a regular expression: {error}")
        yield from self._problems_of_weights()

    def _problems_of_weights(self) -> Iterator[Problem]:
        if self.weights is None:
            return
        if not all(0 < weight < float("inf") for weight in self.weights):
            yield Problem(
                "weights", self.weights, "must be numbers above 0; leave out a SOURCE that is to give nothing"
            )
        # A single SOURCE may be a prepared folder, which holds several.
        if len(self.train) > 1 and len(self.weights) != len(self.train):
            yield Problem("weights", self.weights, f"must have one number for each of the {len(self.train)} SOURCEs")
