"""Data sources: a SOURCE as typed by the user is parsed once, and planned as ranges that are read independently."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, Literal, NamedTuple, Protocol

from gemmule.data.discovery import Skipped, check_format, find_files
from gemmule.data.documents import Document, FileRange, ReadStats, ReadWarnings
from gemmule.data.plain_text import Separator
from gemmule.data.readers import read_file_range, split_file
from gemmule.data.rows import document_of
from gemmule.data.settings import DataSettings
from gemmule.data.spool import is_stream, spool
from gemmule.data.streams import File, file_version, hub_errors
from gemmule.data.tasks import StorybookTaskRange, TextTaskRange, parse_kinds
from gemmule.errors import MissingExtra, SourceError
from gemmule.reading import local_path, path_kind

log = logging.getLogger(__name__)

Split = Literal["train", "validation"]

UNIT = 8 << 20  # bytes of text: the minimum size of a work unit
_MAX_UNITS = 2048  # work units per source, approximately

# Stories of different seeds are different samples, so no story is in both splits.
_STORY_SEEDS: dict[Split, int] = {"train": 1, "validation": 2}
_STORY_COUNTS: dict[Split, int] = {"train": 40_000, "validation": 1_000}
_TASK_COUNTS: dict[Split, int] = {"train": 20_000, "validation": 500}
_STORY_SIZE = 800  # bytes, approximately


class SourceRange(Protocol):
    """Consecutive documents of a source that is not a file, read sequentially by one process."""

    @property
    def size(self) -> int:
        """Bytes of text, approximately."""
        ...

    @property
    def origin(self) -> str:
        """The name of what is read, in messages."""
        ...

    def read(self, settings: DataSettings) -> Iterator[Document]:
        """Yield the documents in a fixed order; raises SourceError where they cannot be read."""
        ...


AnyRange = FileRange | SourceRange


class Source(Protocol):
    """Where documents come from."""

    def ranges(self, settings: DataSettings, split: Split) -> Iterator[AnyRange]:
        """Yield the ranges of the source in a fixed order; raises SourceError where it does not exist."""
        ...


class WorkUnit(NamedTuple):
    """A work unit: consecutive documents of a source, processed by one worker in one task."""

    split: Split
    number: int  # among the units of the split
    source: int  # among the sources of the split
    ranges: tuple[AnyRange, ...]

    @property
    def name(self) -> str:
        """The stem of the names of files made from it."""
        return f"{self.split}-{self.number:05d}"

    @property
    def size(self) -> int:
        """Bytes of text, approximately; 0 where unknown."""
        return sum(each.size for each in self.ranges)


def plan_units(settings: DataSettings, split: Split) -> list[WorkUnit]:
    """Partition the sources of a split into work units: concatenated in order, they are its documents.

    Deterministic: a pure function of the settings and the sources, the same in every process and run. Files that are
    skipped are reported.
    """
    units: list[WorkUnit] = []
    for number, text in enumerate((settings.train if split == "train" else settings.validation) or ()):
        for ranges in _grouped(list(parse_source(text).ranges(settings, split))):
            units.append(WorkUnit(split, len(units), number, ranges))
    return units


def _grouped(ranges: Sequence[AnyRange]) -> Iterator[tuple[AnyRange, ...]]:
    """Group small ranges, such as those of small files, into one unit."""
    step = max(UNIT, sum(each.size for each in ranges) // _MAX_UNITS)
    group: list[AnyRange] = []
    size = 0
    for each in ranges:
        if group and size + each.size > step:
            yield tuple(group)
            group, size = [], 0
        group.append(each)
        size += each.size
    if group:
        yield tuple(group)


def read_sources(sources: Sequence[str], settings: DataSettings, split: Split) -> Iterator[Document]:
    """Yield the documents of several SOURCEs, one source after the other."""
    return chain.from_iterable(read_source(source, settings, split) for source in sources)


def read_source(source: str, settings: DataSettings, split: Split) -> Iterator[Document]:
    """Yield the documents of a SOURCE in a fixed order; raises SourceError where it cannot be read.

    Warnings about its files follow after the last document.
    """
    warnings = ReadWarnings(Separator.of(settings.separator).text)
    for origin, ranges in groupby(parse_source(source).ranges(settings, split), attrgetter("origin")):
        stats = ReadStats()
        for each in ranges:
            for document in read_range(each, settings):
                stats = stats.add(document)
                yield document
        warnings.add(origin, stats)
    for message in warnings.messages():
        log.info(message)


def read_range(source_range: AnyRange, settings: DataSettings) -> Iterator[Document]:
    """Yield the documents of a range."""
    if isinstance(source_range, FileRange):
        yield from read_file_range(source_range, settings)
    else:
        yield from source_range.read(settings)


def parse_source(text: str) -> Source:
    """Parse a SOURCE; a path that exists is that path, whatever it looks like. Raises SourceError where malformed."""
    kind, _, rest = text.partition(":")
    if kind in SOURCES and path_kind(local_path(text)) is None:
        return SOURCES[kind](rest)
    return StreamSource(text) if is_stream(text) else LocalSource(text)


def _split_files(files: Sequence[File], settings: DataSettings) -> Iterator[FileRange]:
    step = max(UNIT, sum(file_version(file).size for file in files) // _MAX_UNITS)
    for file in files:
        yield from split_file(file, settings, step)


@dataclass(frozen=True)
class LocalSource:
    """A local file, folder or glob."""

    path: str

    def ranges(self, settings: DataSettings, _split: Split) -> Iterator[AnyRange]:
        """Yield the ranges of all files."""
        if self.path in SOURCES:
            log.info(f"{self.path}: the local path of this name is read")
        files = find_files(self.path, skipped := Skipped())
        if message := skipped.clause(f"{self.path}: "):
            log.info(message)
        yield from _split_files([File(str(found)) for found in files], settings)


@dataclass(frozen=True)
class StreamSource:
    """Standard input, a pipe or a device: copied to a temporary file first."""

    name: str

    def ranges(self, settings: DataSettings, _split: Split) -> Iterator[AnyRange]:
        """Yield the ranges of the copy."""
        file = spool(self.name)
        log.info(f"{self.name}: is read as {file.suffix}{file.compression}")
        yield from _split_files([file], settings)


@dataclass(frozen=True)
class StorybookSource:
    """Stories of the storybook: `count` of them (None: a default per split) from number `start`."""

    count: int | None = None
    start: int = 0

    def stories(self, split: Split) -> int:
        """Return the number of stories for a split."""
        return _STORY_COUNTS[split] if self.count is None else self.count

    def ranges(self, settings: DataSettings, split: Split) -> Iterator[AnyRange]:
        """Yield ranges of story numbers; train and validation have different seeds."""
        if settings.kind != "text":
            raise SourceError(f'storybook is text, so data.kind = "{settings.kind}" cannot be read from it')
        end, step = self.start + self.stories(split), UNIT // _STORY_SIZE
        for first in range(self.start, end, step):
            stop = min(first + step, end)
            yield StoryRange(_STORY_SEEDS[split], first, stop, (stop - first) * _STORY_SIZE)


class StoryRange(NamedTuple):
    """Stories `start` to `stop` of a seed."""

    seed: int
    start: int
    stop: int
    size: int

    @property
    def origin(self) -> str:
        """The name of the corpus."""
        return "storybook"

    def read(self, _settings: DataSettings) -> Iterator[Document]:
        """Yield the stories with their log-probabilities."""
        from gemmule.storybook import stories

        for story in stories(self.stop - self.start, self.seed, self.start):
            yield Document(story.text, story.log_probability)


def parse_storybook(rest: str) -> Source:
    """Parse COUNT:START, both optional."""
    parts = rest.split(":") if rest else []
    if len(parts) > 2 or not all(part.isdecimal() for part in parts) or parts[:1] == ["0"]:
        raise SourceError(f"storybook:{rest}: write it as storybook, storybook:COUNT or storybook:COUNT:START")
    return StorybookSource(*map(int, parts))


@dataclass(frozen=True)
class StorybookTaskSource:
    """Tasks about stories, of some kinds (none: all): `count` of them (None: a default per split) from `start`."""

    count: int | None = None
    start: int = 0
    kinds: tuple[str, ...] = ()

    def ranges(self, settings: DataSettings, split: Split) -> Iterator[AnyRange]:
        """Yield ranges of task numbers; those of validation are held out, and of another seed."""
        if settings.kind == "text":
            raise SourceError(
                'storybook-tasks is no text: set data.kind to "conversations", "preferences" or "prompts"'
            )
        end = self.start + (_TASK_COUNTS[split] if self.count is None else self.count)
        step = UNIT // (4 * _STORY_SIZE)  # a task takes longer to make than a story
        for first in range(self.start, end, step):
            stop = min(first + step, end)
            size = (stop - first) * _STORY_SIZE
            yield StorybookTaskRange(_STORY_SEEDS[split], first, stop, size, split == "validation", self.kinds)


def parse_storybook_tasks(rest: str) -> Source:
    """Parse COUNT:START:KINDS, all optional."""
    numbers, kinds = rest.split(":")[:2], rest.split(":")[2:]
    malformed = len(kinds) > 1 or (rest and not all(part.isdecimal() for part in numbers)) or numbers[0] == "0"
    if malformed:
        raise SourceError(
            f"storybook-tasks:{rest}: write it as storybook-tasks, storybook-tasks:COUNT, storybook-tasks:COUNT:START "
            "or storybook-tasks:COUNT:START:KINDS"
        )
    count, start = (*map(int, filter(None, numbers)), None, None)[:2]
    return StorybookTaskSource(count, start or 0, parse_kinds(kinds[0]) if kinds else ())


@dataclass(frozen=True)
class TextTaskSource:
    """Tasks made from the documents of another SOURCE: words that must occur, at most n sentences, an ending."""

    source: Source

    def ranges(self, settings: DataSettings, split: Split) -> Iterator[AnyRange]:
        """Yield the ranges of the source."""
        if settings.kind not in ("conversations", "prompts"):
            raise SourceError('text-tasks gives tasks: set data.kind to "conversations" or "prompts"')
        for each in self.source.ranges(settings.replace(kind="text"), split):
            yield TextTaskRange(each, read_range, each.origin, each.size, split == "validation")


def parse_text_tasks(rest: str) -> Source:
    """Parse the SOURCE that tasks are made from."""
    if not rest:
        raise SourceError("text-tasks: write it as text-tasks:SOURCE, such as text-tasks:stories.txt")
    return TextTaskSource(parse_source(rest))


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset repository of the Hugging Face Hub, read by byte ranges without a download."""

    path: str  # owner/name/FILE

    def ranges(self, settings: DataSettings, _split: Split) -> Iterator[AnyRange]:
        """Yield the ranges of the file."""
        file = File(self.path, on_hub=True)
        check_format(file)
        yield from _split_files([file], settings)


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, streamed; None for the split that is prepared, and for `data.column`."""

    name: str
    split: str | None = None
    column: str | None = None

    def ranges(self, settings: DataSettings, split: Split) -> Iterator[AnyRange]:
        """Yield the shards of the dataset."""
        shard = HubShard(self.name, self.split or split, self.column or settings.column, 0, 0)
        with hub_errors(shard.origin):
            count = _hub_dataset(shard.name, shard.split).num_shards
        for number in range(count):
            yield shard._replace(number=number, shards=count, size=UNIT)


class HubShard(NamedTuple):
    """One shard of a dataset of the Hugging Face Hub."""

    name: str
    split: str
    column: str
    number: int  # among the shards
    shards: int
    size: int = 0

    @property
    def origin(self) -> str:
        """The dataset with split and column."""
        return f"hf:{self.name}:{self.split}:{self.column}"

    def read(self, settings: DataSettings) -> Iterator[Document]:
        """Stream the rows of the shard."""
        settings = settings.replace(column=self.column)
        place = self.origin if self.shards == 1 else f"{self.origin}: shard {self.number}"
        with hub_errors(self.origin):
            rows = _hub_dataset(self.name, self.split).shard(num_shards=self.shards, index=self.number)
            for number, row in enumerate(rows, 1):
                yield document_of(row, settings, partial("{}: row {}".format, place, number), known=number > 1)


def parse_hub(rest: str) -> Source:
    """Parse owner/name:SPLIT:COLUMN, or the path of one file of a repository."""
    name, *parts = rest.split(":")
    if len(parts) > 2 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?|[\w.-]+(/[^/*?]+){2,}", name):
        raise SourceError(
            f"hf:{rest}: write it as hf:owner/name, hf:owner/name:SPLIT:COLUMN or hf:owner/name/FILE; "
            f"a local file of this name is ./hf:{rest}"
        )
    return HubFile(rest) if name.count("/") > 1 else HubDataset(name, *parts)


def _hub_dataset(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "sources", f"hf:{name}") from None
    return datasets.load_dataset(name, split=split, streaming=True)


# By prefix: what parses the rest of a SOURCE that is not a local path.
SOURCES: dict[str, Callable[[str], Source]] = {
    "hf": parse_hub,
    "storybook": parse_storybook,
    "storybook-tasks": parse_storybook_tasks,
    "text-tasks": parse_text_tasks,
}
