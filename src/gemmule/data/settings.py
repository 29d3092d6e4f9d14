"""The settings of the data: what is read, and how it is divided."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gemmule.recipe import Problem, Settings


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# One SOURCE, or several that are read one after the other.
Sources = Annotated[tuple[str, ...], Field(min_length=1, strict=False), BeforeValidator(_listed)]


class DataSettings(Settings):
    """What to train and validate on.

    A SOURCE is a file, a folder, a glob, hf:owner/name[:split[:column]], hf:owner/name/FILE, storybook[:count[:start]],
    or a folder that `gemmule prepare` made, which brings its own validation documents.
    """

    train: Sources = Field(description="the SOURCE to train on, or a list of several")
    validation: Sources | None = Field(
        None, description="the SOURCE to validate on, or a list; without it, train documents are held out"
    )
    holdout: float = Field(0.01, description="share of the train documents to hold out where validation is not set")
    separator: str = Field("<|endoftext|>", description="what stands between the documents of a .txt file")
    column: str = Field("text", description="where the text of .jsonl, .parquet and hf: rows is")
    mask_documents: bool = Field(False, description="whether a token sees its own document only")

    def problems(self) -> Iterator[Problem]:
        """Yield values that leave nothing to train or validate on, or that cannot separate anything."""
        if self.validation is None and not 0 < self.holdout < 1:
            yield Problem("holdout", self.holdout, "must lie between 0 and 1, such as 0.01; or set data.validation")
        if not self.separator:
            yield Problem("separator", self.separator, 'must not be empty; "\\n\\n" would separate paragraphs')
