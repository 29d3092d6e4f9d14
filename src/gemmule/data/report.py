"""The report of a preparation: counts per split and source, to print and to store as JSON."""

from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

# Lower bounds of the bins of the length histogram, in tokens: two per doubling.
LENGTHS = tuple(round(2 ** (half / 2)) for half in range(2, 50))
_BAR = 30  # characters: the longest bar
_DROPPED = "dropped: "  # prefix of the titles of reasons to drop


class LossMaskReport(BaseModel):
    """What is trained on in a split of conversations or preferences, counted in its token shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: dict[str, int]  # by role; "template" is what is of none
    trained: dict[str, int]  # the same, of the tokens that are trained on
    replies: int = 0  # runs of trained tokens
    ended: int = 0  # replies that end with <end_of_turn>
    special_spellings: int = 0  # messages whose text spells a special token, which stays text

    @property
    def trained_tokens(self) -> int:
        """Trained tokens of all roles."""
        return sum(self.trained.values())

    def __str__(self) -> str:
        total, trained = sum(self.tokens.values()), self.trained_tokens
        roles = ", ".join(f"{role} {self.trained[role]:,} of {count:,}" for role, count in self.tokens.items())
        lines = [
            f"{trained:,} of {total:,} tokens ({trained / max(1, total):.1%}) are trained: {roles}",
            f"replies that end with <end_of_turn>: {self.ended:,} of {self.replies:,}",
        ]
        if self.special_spellings:
            lines.append(f"messages that spell a special token, which stays text: {self.special_spellings:,}")
        return "; ".join(lines)


def add_loss_masks(reports: Sequence[LossMaskReport]) -> LossMaskReport:
    """Add the counts of several reports."""
    roles = list(reports[0].tokens)
    tokens, trained = (
        {role: sum(getattr(report, name)[role] for report in reports) for role in roles}
        for name in ("tokens", "trained")
    )
    sums = {
        name: sum(getattr(report, name) for report in reports) for name in ("replies", "ended", "special_spellings")
    }
    return LossMaskReport(tokens=tokens, trained=trained, **sums)


class SourceReport(BaseModel):
    """The counts of one source in the train split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    documents: int
    bytes: int
    tokens: int


class SplitReport(BaseModel):
    """The counts of one split: documents unless said otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    read: int  # before cleaning
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
    duplicate: int = 0  # dropped: exact duplicate of an earlier document
    near_duplicate: int = 0  # dropped: similar to an earlier document
    shared: int = 0  # dropped from train: exact duplicate of a validation document
    near_shared: int = 0  # dropped from train: similar to a validation document
    repaired: int = 0  # kept, with mojibake undone
    held_out: int = 0  # moved from train to validation
    kept: int
    bytes: int  # UTF-8 bytes of the documents kept
    tokens: int  # with bos and eos
    longest: int  # tokens of the longest document
    lengths: tuple[int, ...] = ()  # histogram of document lengths over LENGTHS, up to the last non-empty bin
    loss_mask: LossMaskReport | None = None  # of conversations and preferences

    @property
    def bytes_per_token(self) -> float:
        """The compression of the tokenizer, BOS and EOS included."""
        return self.bytes / self.tokens


class CorpusReport(BaseModel):
    """The counts of a prepared corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: SplitReport
    validation: SplitReport
    sources: tuple[SourceReport, ...]  # of train

    def __str__(self) -> str:
        lines = [f"{'':<34}{'train':>16}{'validation':>16}"]
        for title, name in TITLES.items():
            values = (getattr(self.train, name), getattr(self.validation, name))
            if any(values):
                lines.append(f"{title:<34}" + "".join(f"{_figure(value):>16}" for value in values))
        named = f"sources: {self.train.source} (train), {self.validation.source} (validation)"
        return "\n".join([named, *lines, *self._loss_masks(), *_histogram(self.train.lengths), *self._shares()])

    def _loss_masks(self) -> Iterator[str]:
        for name, split in (("train", self.train), ("validation", self.validation)):
            if split.loss_mask is not None:
                yield f"{name}: {split.loss_mask}"

    def _shares(self) -> Iterator[str]:
        if len(self.sources) > 1:
            yield "by source"
            for part in self.sources:
                share = part.tokens / self.train.tokens
                yield f"  {part.source}: {counted(part.documents, 'document')}, {part.tokens:,} tokens ({share:.1%})"


def counted(count: int, noun: str) -> str:
    """Format a count with its noun, singular or plural."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def describe_tally(tally: Mapping[str, int]) -> str:
    """Describe how many documents were dropped and repaired; empty where none were."""
    found = [(title.strip(), tally.get(name, 0)) for title, name in TITLES.items() if tally.get(name, 0)]
    dropped = [f"{count:,} {title.removeprefix(_DROPPED)}" for title, count in found if title.startswith(_DROPPED)]
    repaired = [f"{count:,} {title}" for title, count in found if title.startswith("repaired")]
    return "; ".join([*([_DROPPED + ", ".join(dropped)] if dropped else []), *repaired])


def describe_epochs(sources: Sequence[str], tokens: Sequence[int], weights: Sequence[float], seen: int) -> str:
    """Describe the epochs over each source that training on `seen` tokens makes."""
    if len(tokens) == 1:
        return f"{seen / tokens[0]:.2f} epochs"
    epochs = (seen * weight / sum(weights) / own for own, weight in zip(tokens, weights, strict=True))
    return ", ".join(f"{count:.2f} epochs of {source}" for count, source in zip(epochs, sources, strict=True))


def _histogram(lengths: Sequence[int]) -> Iterator[str]:
    """Yield the histogram of train document lengths, one line per doubling."""
    doubled = [sum(lengths[index : index + 2]) for index in range(0, len(lengths), 2)]
    if not doubled:
        return
    yield "document length in tokens"
    first = next(power for power, count in enumerate(doubled) if count)
    for power, count in enumerate(doubled[first:], start=first):
        bar = "#" * round(_BAR * count / max(doubled))
        bounds = f"{2 ** (power + 1):,} to {2 ** (power + 2) - 1:,}"
        yield f"  {bounds:<24}{count:>12,}  {bar}".rstrip()


TITLES: Mapping[str, str] = {
    "documents read": "read",
    "  dropped: not UTF-8": "not_utf8",
    "  dropped: empty": "empty",
    "  dropped: too short": "too_short",
    "  dropped: too long": "too_long",
    "  dropped: by pattern": "unwanted",
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
    "longest document (tokens)": "longest",
}


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
