"""What preparing a corpus found and did, to print and to keep."""

from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

# Where the bins of the histogram of lengths begin, in tokens: two for each doubling.
LENGTHS = tuple(round(2 ** (half / 2)) for half in range(2, 50))
_BAR = 30  # characters


class SourceReport(BaseModel):
    """What a source gives to the train split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    documents: int
    bytes: int
    tokens: int


class SplitReport(BaseModel):
    """The counts of one split: documents unless said otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    read: int  # as the source has them
    not_utf8: int = 0  # dropped
    empty: int = 0  # dropped
    too_short: int = 0  # dropped, as are the next ones, by the filters
    too_long: int = 0
    unwanted: int = 0
    few_letters: int = 0
    odd_words: int = 0
    many_symbols: int = 0
    repeated_lines: int = 0
    repeated_phrases: int = 0
    duplicate: int = 0  # dropped: the words are those of an earlier document
    near_duplicate: int = 0  # dropped: similar to an earlier document
    shared: int = 0  # dropped from train: the words are those of a validation document
    near_shared: int = 0  # dropped from train: similar to a validation document
    repaired: int = 0  # kept, after UTF-8 that had been read as cp1252 was decoded
    held_out: int = 0  # moved from train to validation
    kept: int
    bytes: int  # UTF-8 bytes of the text kept
    tokens: int  # with bos and eos
    longest: int  # tokens of the longest document
    lengths: tuple[int, ...] = ()  # how many documents there are in each bin of LENGTHS, up to the last that has any

    @property
    def bytes_per_token(self) -> float:
        """How much text a token stands for, bos and eos included."""
        return self.bytes / self.tokens


class CorpusReport(BaseModel):
    """The counts of a prepared corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: SplitReport
    validation: SplitReport
    sources: tuple[SourceReport, ...]  # of train

    def __str__(self) -> str:
        lines = [f"{'':<34}{'train':>16}{'validation':>16}"]
        for label, name in LABELS.items():
            values = (getattr(self.train, name), getattr(self.validation, name))
            if any(values):
                lines.append(f"{label:<34}" + "".join(f"{_figure(value):>16}" for value in values))
        named = f"sources: {self.train.source} (train), {self.validation.source} (validation)"
        return "\n".join([named, *lines, *_histogram(self.train.lengths), *self._shares()])

    def _shares(self) -> Iterator[str]:
        if len(self.sources) > 1:
            yield "by source"
            for part in self.sources:
                share = part.tokens / self.train.tokens
                yield f"  {part.source}: {part.documents:,} documents, {part.tokens:,} tokens ({share:.1%})"


def describe_epochs(sources: Sequence[str], tokens: Sequence[int], weights: Sequence[float], seen: int) -> str:
    """Say how often training on `seen` tokens goes through each source, of which it has so many tokens."""
    if len(tokens) == 1:
        return f"{seen / tokens[0]:.2f} epochs"
    epochs = (seen * weight / sum(weights) / own for own, weight in zip(tokens, weights, strict=True))
    return ", ".join(f"{count:.2f} epochs of {source}" for count, source in zip(epochs, sources, strict=True))


def _histogram(lengths: Sequence[int]) -> Iterator[str]:
    """Draw the lengths of train documents, a line for each doubling."""
    doubled = [sum(lengths[place : place + 2]) for place in range(0, len(lengths), 2)]
    if not doubled:
        return
    yield "tokens of a document"
    first = next(place for place, count in enumerate(doubled) if count)
    for place, count in enumerate(doubled[first:], start=first):
        bar = "#" * round(_BAR * count / max(doubled))
        bounds = f"{2 ** (place + 1):,} to {2 ** (place + 2) - 1:,}"
        yield f"  {bounds:<24}{count:>12,}  {bar}".rstrip()


LABELS: Mapping[str, str] = {
    "documents read": "read",
    "  dropped: not UTF-8": "not_utf8",
    "  dropped: empty": "empty",
    "  dropped: too short": "too_short",
    "  dropped: too long": "too_long",
    "  dropped: by a pattern": "unwanted",
    "  dropped: few letters": "few_letters",
    "  dropped: odd words": "odd_words",
    "  dropped: many symbols": "many_symbols",
    "  dropped: repeated lines": "repeated_lines",
    "  dropped: repeated phrases": "repeated_phrases",
    "  dropped: duplicates": "duplicate",
    "  dropped: near-duplicates": "near_duplicate",
    "  dropped: also in validation": "shared",
    "  dropped: nearly in validation": "near_shared",
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
