"""The settings of the data: what is read, and how it is divided."""

from collections.abc import Iterator

from pydantic import Field

from gemmule.recipe import Problem, Settings


class DataSettings(Settings):
    """What to train and validate on.

    A SOURCE is a file, a folder, a glob, hf:owner/name[:split[:column]], hf:owner/name/FILE, storybook[:count[:start]],
    or a folder that `gemmule prepare` made, which brings its own validation documents.
    """

    train: str = Field(description="the SOURCE to train on")
    validation: str | None = Field(None, description="the SOURCE to validate on; without it, train documents held out")
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
