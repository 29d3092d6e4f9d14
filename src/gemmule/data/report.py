"""What preparing a corpus found and did, to print and to keep."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict


class SplitReport(BaseModel):
    """The counts of one split: documents unless said otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    read: int  # as the source has them
    not_utf8: int = 0  # dropped
    empty: int = 0  # dropped
    duplicate: int = 0  # dropped: the words are those of an earlier document
    shared: int = 0  # dropped from train: the words are those of a validation document
    repaired: int = 0  # kept, after UTF-8 that had been read as cp1252 was decoded
    held_out: int = 0  # moved from train to validation
    kept: int
    bytes: int  # UTF-8 bytes of the text kept
    tokens: int  # with bos and eos
    longest: int  # tokens of the longest document

    @property
    def bytes_per_token(self) -> float:
        """How much text a token stands for, bos and eos included."""
        return self.bytes / self.tokens


class CorpusReport(BaseModel):
    """The counts of a prepared corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: SplitReport
    validation: SplitReport

    def __str__(self) -> str:
        lines = [f"{'':<32}{'train':>16}{'validation':>16}"]
        for label, name in _LINES.items():
            values = (getattr(self.train, name), getattr(self.validation, name))
            if any(values):
                lines.append(f"{label:<32}" + "".join(f"{_figure(value):>16}" for value in values))
        sources = f"sources: {self.train.source} (train), {self.validation.source} (validation)"
        return "\n".join([sources, *lines])


_LINES: Mapping[str, str] = {
    "documents read": "read",
    "  dropped: not UTF-8": "not_utf8",
    "  dropped: empty": "empty",
    "  dropped: duplicates": "duplicate",
    "  dropped: also in validation": "shared",
    "  held out for validation": "held_out",
    "  repaired: cp1252 mojibake": "repaired",
    "documents kept": "kept",
    "bytes of text": "bytes",
    "tokens": "tokens",
    "bytes per token": "bytes_per_token",
    "tokens of the longest document": "longest",
}


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
