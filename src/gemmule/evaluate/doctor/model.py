"""The model under test, and what a check returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gemmule.data.settings import DataSettings
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer

Verdict = Literal["passed", "failed", "skipped"]


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    verdict: Verdict
    sentence: str


# What a check returns; its name is added by `examine`.
Answer = tuple[Verdict, str]


@dataclass(frozen=True)
class ModelUnderTest:
    """A model in fp32 and its tokenizer; `declared` holds config.json and its like, by file name, where known.

    `data` is text that the model should predict well. Without it the built-in texts are used, and the validation
    documents of `dataset`, a prepared dataset of the model's tokenizer, where there is one.
    """

    model: Gemma3
    tokenizer: Tokenizer
    declared: Mapping[str, Any] = field(default_factory=dict)
    data: DataSettings | None = None
    dataset: Path | None = None

    @property
    def config(self) -> Gemma3Config:
        """The model's config."""
        return self.model.config
