"""The settings of the data: sources, filters, deduplication, splits and mixture weights."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gemmule.fields import UNSET, Count, CountFrom0, Noun, Text
from gemmule.settings import Problem, Settings


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# One SOURCE, or several that are concatenated.
Sources = Annotated[
    tuple[Text, ...],
    Field(min_length=1, strict=False),
    BeforeValidator(_listed),
    Noun("a SOURCE or a list of SOURCEs"),
]
# What the rows of the SOURCEs are.
Kind = Literal["text", "conversations", "preferences", "prompts"]
# Settings that recipes and datasets of text do not have.
CHAT_SETTINGS = frozenset({"kind", "too_long"})
Weights = Annotated[tuple[float, ...], Field(min_length=1, strict=False)]


class DataSettings(Settings):
    """The training and validation data.

    A SOURCE is a file, a folder, a glob, hf:owner/name[:split[:column]], hf:owner/name/FILE, storybook[:count[:start]],
    storybook-tasks[:count[:start[:kinds]]], text-tasks:SOURCE, or a dataset of `gemmule prepare`, which has its own
    validation split.
    """

    train: Sources = Field(description="the SOURCE to train on, or a list of several", examples=["storybook"])
    kind: Annotated[Kind, Noun('"text", "conversations", "preferences" or "prompts"')] = Field(
        "text",
        description="what the rows are: text; conversations, of which the replies are learned; preferences, with a "
        "chosen and a rejected reply; or prompts for rewards",
    )
    validation: Sources | None = Field(
        None, description="the SOURCE to validate on, or a list; without it, train documents are held out"
    )
    weights: Weights | None = Field(
        None,
        description="mixture weights of the SOURCEs by training tokens, such as [3, 1]; without it, all of each",
    )
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.01, description="share of the train documents held out for validation where validation is not set"
    )
    separator: str = Field("<|endoftext|>", description="separator between documents in .txt files")
    column: Text = Field("text", description="column with the text, in .jsonl, .csv, .parquet and hf: sources")
    min_characters: CountFrom0 = Field(0, description="minimum length of a document; shorter ones are dropped")
    max_characters: Count | None = Field(None, description="maximum length of a document; longer ones are dropped")
    keep_matching: Text | None = Field(None, description="regular expression; documents without a match are dropped")
    drop_matching: Text | None = Field(None, description="regular expression; documents with a match are dropped")
    quality: bool = Field(
        False, description="quality filter: drop what looks like tables, keys, markup, boilerplate or loops"
    )
    near_duplicates: Annotated[float, Field(ge=0.6, le=1)] | None = Field(
        None,
        description="fuzzy deduplication: the MinHash similarity from which documents are dropped, such as 0.8",
    )
    license: Text | None = Field(
        None, description="license of the text, as it is to stand in reports and model cards, such as cc-by-4.0"
    )
    too_long: Literal["drop", "drop_turns"] = Field(
        "drop",
        description="what becomes of a conversation longer than train.context: drop leaves it out, drop_turns leaves "
        "out its last turns; a pair of preferences is always left out",
    )
    mask_documents: bool = Field(False, description="document mask: restrict attention to the document of a token")

    @property
    def masks_documents(self) -> bool:
        """Whether attention is restricted to the document of a token; always so in conversations."""
        return self.mask_documents or self.kind != "text"

    def unused(self) -> frozenset[str]:
        """Return the settings that text does not have."""
        return CHAT_SETTINGS if self.kind == "text" else frozenset()

    @classmethod
    def adapt(cls, table: dict[str, Any], changes: dict[str, Any]) -> Iterator[str]:
        """Drop a recipe's data.validation where data.train is overridden; documents are held out instead."""
        other = changes.get("train", table.get("train")) != table.get("train")
        if other and "validation" not in changes and table.pop("validation", UNSET) != UNSET:
            yield (
                "data.train was changed, so the data.validation of the recipe is left out: documents of the new text "
                "are held out instead (data.holdout), or those that a prepared folder brings are taken; "
                "--set data.validation=SOURCE validates on other text"
            )

    def problems(self) -> Iterator[Problem]:
        """Yield invalid values, and combinations that leave nothing to train or validate on."""
        for name in ("train", "validation"):
            if UNSET in (getattr(self, name) or ()):
                yield Problem(name, getattr(self, name), f'{UNSET} is not a SOURCE; a file of that name is "./{UNSET}"')
        if self.validation is None and not 0 < self.holdout < 1:
            yield Problem("holdout", self.holdout, "must lie between 0 and 1, such as 0.01; or set data.validation")
        if not self.separator:
            yield Problem("separator", self.separator, 'must not be empty; "\\n\\n" would separate paragraphs')
        if self.max_characters is not None and self.max_characters < self.min_characters:
            advice = f"leaves no document; use more than min_characters ({self.min_characters})"
            yield Problem("max_characters", self.max_characters, advice)
        for name in ("keep_matching", "drop_matching"):
            try:
                re.compile(getattr(self, name) or "")
            except (re.error, OverflowError, RecursionError) as error:
                yield Problem(name, getattr(self, name), f"is not a regular expression: {error}")
        yield from self._problems_of_weights()

    def _problems_of_weights(self) -> Iterator[Problem]:
        if self.weights is None:
            return
        if not all(0 < weight < float("inf") for weight in self.weights):
            yield Problem(
                "weights", self.weights, "must be numbers above 0; leave out a SOURCE instead of weighting it 0"
            )
        # A single SOURCE may be a prepared folder, which holds several.
        if len(self.train) > 1 and len(self.weights) != len(self.train):
            yield Problem("weights", self.weights, f"must have one number for each of the {len(self.train)} SOURCEs")
