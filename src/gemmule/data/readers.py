"""File formats: how a file of each format is split into ranges, and how a range is read."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gemmule.data.documents import Document, FileRange
from gemmule.data.plain_text import read_text, split_text
from gemmule.data.rows import read_csv, read_json, read_lines, read_table, read_tsv, split_lines, split_table
from gemmule.data.settings import DataSettings
from gemmule.data.streams import File, FileVersion, file_version, read_errors
from gemmule.errors import SourceError

_COMPRESSION_RATIO = 4  # assumed


class Format(NamedTuple):
    """A file format: how a file is split into ranges of about so many bytes, and how a range is read."""

    split: Callable[[File, FileVersion, DataSettings, int], Iterator[FileRange]]
    read: Callable[[FileRange, DataSettings], Iterator[Document]]


def split_file(file: File, settings: DataSettings, step: int) -> Iterator[FileRange]:
    """Yield the ranges of a file, of about `step` bytes each, in order; compressed files are not split."""
    if settings.kind != "text" and file.suffix in (".txt", ".md"):
        advice = "is plain text without rows; name .jsonl, .json, .csv or .parquet files"
        raise SourceError(f'{file}: {advice} for data.kind = "{settings.kind}"')
    with read_errors(file):
        split = _unsplit if file.compression else FORMATS[file.suffix].split
        yield from split(file, file_version(file), settings, step)


def _unsplit(file: File, version: FileVersion, _settings: DataSettings, _step: int) -> Iterator[FileRange]:
    size = version.size * (_COMPRESSION_RATIO if file.compression else 1)
    yield FileRange(file, size=size, version=version)


def read_file_range(file_range: FileRange, settings: DataSettings) -> Iterator[Document]:
    """Yield the documents of a range of a file; SourceError where it is damaged, of another format, or has changed."""
    with read_errors(file_range.file):
        if file_range.version != file_version(file_range.file):
            raise SourceError(f"{file_range.file}: has changed since the preparation started; start again")
        yield from FORMATS[file_range.file.suffix].read(file_range, settings)


FORMATS: dict[str, Format] = {
    ".txt": Format(split_text, read_text),
    ".md": Format(split_text, read_text),
    ".jsonl": Format(split_lines, read_lines),
    ".ndjson": Format(split_lines, read_lines),
    ".json": Format(_unsplit, read_json),
    ".csv": Format(_unsplit, read_csv),
    ".tsv": Format(_unsplit, read_tsv),
    ".parquet": Format(split_table, read_table),
}
