"""Where text comes from: a SOURCE, as the user writes it, becomes spans that can be read apart from each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gemmule.data.readers import (
    FORMATS,
    Document,
    Misread,
    Span,
    check_encoding,
    cut_file,
    read_file_span,
    text_of,
)
from gemmule.data.settings import DataSettings
from gemmule.data.streams import COMPRESSIONS, HUB, ending_of, stamp_of
from gemmule.errors import MissingExtra, SourceError, UserError

Split = Literal["train", "validation"]

UNIT = 8 << 20  # bytes of text that are worked on in one go, at least
_UNITS = 2048  # how many units a source is divided into, at most about

# Stories of different seeds are different draws, so train and validation never need to agree on who takes which.
_STORY_SEEDS: dict[Split, int] = {"train": 1, "validation": 2}
_STORY_COUNTS: dict[Split, int] = {"train": 40_000, "validation": 1_000}
_STORY_SIZE = 800  # bytes, about


class Unit(NamedTuple):
    """What one process works on in one go: consecutive documents of a source."""

    split: Split
    number: int  # among the units of the split
    source: int  # among the sources of the split
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        """What files that are made from it are called."""
        return f"{self.split}-{self.number:05d}"

    @property
    def size(self) -> int:
        """Bytes of text, about; 0 where nothing is known."""
        return sum(span.size for span in self.spans)


def plan_units(settings: DataSettings, split: Split) -> list[Unit]:
    """Divide the sources of a split into units: together, in order, they are its documents.

    A pure function of the settings and the sources, so every process and every run divides them alike.
    """
    units: list[Unit] = []
    for number, source in enumerate((settings.train if split == "train" else settings.validation) or ()):
        for spans in _grouped(list(spans_of(source, settings, split))):
            units.append(Unit(split, len(units), number, spans))
    return units


def _grouped(spans: Sequence[Span]) -> Iterator[tuple[Span, ...]]:
    """Join small spans, such as those of small files."""
    step = max(UNIT, sum(span.size for span in spans) // _UNITS)
    group: list[Span] = []
    size = 0
    for span in spans:
        if group and size + span.size > step:
            yield tuple(group)
            group, size = [], 0
        group.append(span)
        size += span.size
    if group:
        yield tuple(group)


def read_sources(sources: Sequence[str], settings: DataSettings, split: Split) -> Iterator[Document]:
    """Yield the documents of several SOURCEs, one after the other."""
    return chain.from_iterable(read_source(source, settings, split) for source in sources)


def read_source(source: str, settings: DataSettings, split: Split) -> Iterator[Document]:
    """Yield the documents of a SOURCE in a fixed order; raises SourceError where it cannot be read."""
    for place, spans in groupby(spans_of(source, settings, split), attrgetter("place")):
        found = Misread()
        for span in spans:
            for document in read_span(span, settings):
                found = found.after(document)
                yield document
        check_encoding(place, found)


def spans_of(source: str, settings: DataSettings, split: Split) -> Iterator[Span]:
    """Yield the spans of a SOURCE in a fixed order; raises SourceError where there is no such source."""
    kind, colon, rest = source.partition(":")
    if kind in SOURCES and (colon or not Path(source).exists()):
        yield from SOURCES[kind].divide(rest, settings, split)
    else:
        yield from _cut_files([str(file) for file in find_files(source)], settings)


def read_span(span: Span, settings: DataSettings) -> Iterator[Document]:
    """Yield the documents of a span."""
    read = SOURCES[span.kind].read if span.kind in SOURCES else read_file_span
    yield from read(span, settings)


def _cut_files(places: Sequence[str], settings: DataSettings) -> Iterator[Span]:
    step = max(UNIT, sum(stamp_of(place).size for place in places) // _UNITS)
    for place in places:
        yield from cut_file(place, settings, step)


def find_files(source: str) -> list[Path]:
    """Return the files that a file name, folder or glob stands for, sorted; folders are searched to their depths."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if ending_of(str(file)) in FORMATS and file.is_file()]
        if not files:
            raise SourceError(f"{source}: this folder holds no {_known_formats()}")
        return files
    if path.exists() or not set(source) & set("*?["):
        files = [path]
    else:
        files = sorted(file for file in _glob(path) if file.is_file())
        if not files:
            raise SourceError(f"{source}: no file matches")
    for file in files:
        if not file.exists():
            raise SourceError(
                f"{file}: no such file or folder; a SOURCE may also be a glob, hf:owner/name or storybook"
            )
        _check_file(str(file))
    return files


def _glob(pattern: Path) -> Iterator[Path]:
    try:
        yield from Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
    except ValueError as error:
        raise SourceError(f"{pattern}: {error}") from None


def _check_file(place: str) -> None:
    if ending_of(place) not in FORMATS:
        raise SourceError(f"{place}: not a kind of file that is read; use {_known_formats()}")
    if not stamp_of(place).size:
        raise SourceError(f"{place}: the file is empty")


def _known_formats() -> str:
    return f"{', '.join(FORMATS)}, or such a file compressed as {' or '.join(COMPRESSIONS)}"


def _divide_storybook(rest: str, _settings: DataSettings, split: Split) -> Iterator[Span]:
    """Tell `count` stories from number `start` on; train and validation use seeds of their own."""
    parts = rest.split(":") if rest else []
    if len(parts) > 2 or not all(part.isdecimal() for part in parts) or parts[:1] == ["0"]:
        raise SourceError(f"storybook:{rest}: write it as storybook, storybook:COUNT or storybook:COUNT:START")
    count, start = [*map(int, parts), *(_STORY_COUNTS[split], 0)[len(parts) :]]
    step = UNIT // _STORY_SIZE
    for first in range(start, start + count, step):
        stop = min(first + step, start + count)
        yield Span("storybook", str(_STORY_SEEDS[split]), first, stop, (stop - first) * _STORY_SIZE)


def _read_storybook(span: Span, _settings: DataSettings) -> Iterator[Document]:
    from gemmule.data.storybook import stories

    assert span.stop is not None
    for story in stories(span.stop - span.start, int(span.place), span.start):
        yield Document(story.text, story.log_probability)


def _divide_hub(rest: str, settings: DataSettings, split: Split) -> Iterator[Span]:
    """Take the shards of a dataset of the Hugging Face Hub, or one file of its repository."""
    name, *parts = rest.split(":")
    if name.count("/") > 1:
        place = HUB + rest
        _check_file(place)
        yield from _cut_files([place], settings)
        return
    if len(parts) > 2 or not name:
        raise SourceError(f"hf:{rest}: write it as hf:owner/name, hf:owner/name:SPLIT:COLUMN or hf:owner/name/FILE")
    wanted, column = [*parts, *(split, settings.column)[len(parts) :]]
    place = f"{name}:{wanted}:{column}"
    with _hub_explained(place):
        shards = _hub_dataset(name, wanted).num_shards
    for shard in range(shards):
        yield Span("hf", place, shard, shards, UNIT)


def _read_hub(span: Span, _settings: DataSettings) -> Iterator[Document]:
    """Stream one shard."""
    name, wanted, column = span.place.split(":")
    with _hub_explained(span.place):
        for row in _hub_dataset(name, wanted).shard(num_shards=span.stop, index=span.start):
            yield text_of(row, column, lambda: f"hf:{span.place}")


def _hub_dataset(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "sources", f"hf:{name}") from None
    return datasets.load_dataset(name, split=split, streaming=True)


@contextmanager
def _hub_explained(place: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library's, its HTTP client's, or that of whatever reads the shard
        raise SourceError(f"hf:{place}: cannot be read ({error})") from error


class Kind(NamedTuple):
    """A kind of source that is not a file here: how it is divided into spans, and how one is read."""

    divide: Callable[[str, DataSettings, Split], Iterator[Span]]
    read: Callable[[Span, DataSettings], Iterator[Document]]


SOURCES: dict[str, Kind] = {
    "hf": Kind(_divide_hub, _read_hub),
    "storybook": Kind(_divide_storybook, _read_storybook),
}
