"""Documents out of files: for each format where a file may be cut into spans, and how a span of it is read."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, NamedTuple

from gemmule.data.settings import DataSettings
from gemmule.data.streams import Stamp, damage_explained, ending_of, is_compressed, open_bytes, open_raw, stamp_of
from gemmule.errors import MissingExtra, SourceError

LONGEST = 1 << 20  # bytes; a longer document of a text file is cut at line ends, so that memory stays bounded
_BLOCK = 1 << 20
_EXPANSION = 4  # how many bytes of text a byte of a compressed file is taken for
_TOLERATED = 0.01  # the share of a file's documents that may be invalid UTF-8 before the file is not text


class Document(NamedTuple):
    """One document as its source has it."""

    text: str | bytes  # bytes where it is not UTF-8
    log_probability: float | None = None  # nats, where the source knows it; such a text is not to be changed
    wrong_at: int | None = None  # the place in a text file of the first byte that is not UTF-8


class Span(NamedTuple):
    """Consecutive documents of a source that are read in one go: those of a whole file, or of a part of one."""

    kind: str  # who reads it: a key of FORMATS or of SOURCES
    place: str  # a file, or whatever `kind` understands
    start: int = 0  # bytes of a text file, row groups of a Parquet file, stories, shards
    stop: int | None = None  # None: to the end
    size: int = 0  # bytes of text, about
    stamp: Stamp | None = None  # of the file when it was cut


class Format(NamedTuple):
    """A kind of file: how it is cut into spans of about so many bytes, and how one is read."""

    cut: Callable[[str, Stamp, DataSettings, int], Iterator[Span]]
    read: Callable[[Span, DataSettings], Iterator[Document]]


def cut_file(place: str, settings: DataSettings, step: int) -> Iterator[Span]:
    """Yield the spans of a file, of about `step` bytes each: read one after the other they are the file."""
    kind = ending_of(place)
    with damage_explained(place):
        stamp = stamp_of(place)
        if is_compressed(place):
            yield Span(kind, place, size=_EXPANSION * stamp.size, stamp=stamp)
        else:
            yield from FORMATS[kind].cut(place, stamp, settings, step)


def read_file_span(span: Span, settings: DataSettings) -> Iterator[Document]:
    """Yield the documents of a span of a file; SourceError where it is damaged, not what its name says, or changed."""
    with damage_explained(span.place):
        if span.stamp != stamp_of(span.place):
            raise SourceError(f"{span.place}: has changed since it was first looked at; start again")
        yield from FORMATS[span.kind].read(span, settings)


# Text files: documents between separators.


def _cut_text(place: str, stamp: Stamp, settings: DataSettings, step: int) -> Iterator[Span]:
    yield from _cut_after(settings.separator.encode(), ".txt", place, stamp, step)


def _cut_after(separator: bytes, kind: str, place: str, stamp: Stamp, step: int) -> Iterator[Span]:
    start = 0
    with open_raw(place) as file:
        while start < stamp.size:
            stop = place_after(file, separator, start + step) if start + step < stamp.size else None
            yield Span(kind, place, start, stop, (stop or stamp.size) - start, stamp)
            start = stop or stamp.size


def place_after(file: IO[bytes], separator: bytes, start: int) -> int | None:
    """Return where the first separator ends that begins at `start` or after, and at which reading from 0 cuts too.

    Separators that overlap ("\\n\\n" in "\\n\\n\\n") are not told apart from the middle of a file: such a place is left
    out. None where there is none.
    """
    begin = max(0, start - len(separator) + 1)
    before = begin - len(separator)  # where the last separator began
    file.seek(begin)
    text = b""
    while block := file.read(_BLOCK):
        text += block
        found = text.find(separator)
        while found >= 0:
            place = begin + found
            if place >= start and place - before >= len(separator):
                return place + len(separator)
            before = place
            found = text.find(separator, found + 1)
        kept = min(len(text), len(separator) - 1)
        begin += len(text) - kept
        text = text[len(text) - kept :]
    return None


def _read_text(span: Span, settings: DataSettings) -> Iterator[Document]:
    with open_bytes(span.place, span.start) as stream:
        for offset, raw in split_stream(stream, settings.separator.encode(), stop=span.stop):
            try:
                yield Document(raw.decode())
            except UnicodeDecodeError as error:
                yield Document(raw, wrong_at=offset + error.start)


def split_stream(
    stream: IO[bytes], separator: bytes, longest: int = LONGEST, stop: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, document) for what stands between separators up to `stop`; memory holds a block and a document.

    Documents longer than `longest` bytes are cut after a line end, or else anywhere between two characters.
    """
    offset, rest = stream.tell(), b""
    while block := stream.read(_BLOCK if stop is None else min(_BLOCK, stop - stream.tell())):
        *whole, rest = (rest + block).split(separator)
        for document in whole:
            yield from _cut(offset, document, longest)
            offset += len(document) + len(separator)
        # What may be the beginning of a separator is left for the next block.
        while len(rest) > longest + len(separator):
            end = _cutting_place(rest, longest)
            yield offset, rest[:end]
            offset, rest = offset + end, rest[end:]
    if rest.strip():
        yield from _cut(offset, rest, longest)


def _cut(offset: int, document: bytes, longest: int) -> Iterator[tuple[int, bytes]]:
    while len(document) > longest:
        end = _cutting_place(document, longest)
        yield offset, document[:end]
        offset, document = offset + end, document[end:]
    yield offset, document


def _cutting_place(text: bytes, longest: int) -> int:
    line_end = text.rfind(b"\n", 0, longest) + 1
    if line_end:
        return line_end
    # A byte 10xxxxxx continues a character; valid UTF-8 has at most three of them in a row.
    return next((end for end in range(longest, max(longest - 4, 0), -1) if text[end] & 0xC0 != 0x80), longest)


class Misread(NamedTuple):
    """How much of a text file, or of a span of it, is not UTF-8."""

    documents: int = 0
    wrong: int = 0
    first: int | None = None  # the first wrong byte

    def after(self, document: Document) -> "Misread":
        """Count one more document."""
        return self.joined(Misread(1, int(document.wrong_at is not None), document.wrong_at))

    def joined(self, later: "Misread") -> "Misread":
        """Count what comes after, too."""
        first = later.first if self.first is None else self.first
        return Misread(self.documents + later.documents, self.wrong + later.wrong, first)


def check_encoding(place: str, found: Misread) -> None:
    """Raise SourceError where too many documents of a file are not UTF-8 for it to be text."""
    if found.wrong > _TOLERATED * found.documents:
        raise SourceError(
            f"{place}: not UTF-8: {found.wrong} of {found.documents} documents, the first at byte {found.first}; "
            "convert it, for instance with iconv -f WINDOWS-1252 -t UTF-8"
        )


# JSON Lines: a document in a column of each line.


def _cut_lines(place: str, stamp: Stamp, _settings: DataSettings, step: int) -> Iterator[Span]:
    yield from _cut_after(b"\n", ".jsonl", place, stamp, step)


def _read_lines(span: Span, settings: DataSettings) -> Iterator[Document]:
    with open_bytes(span.place, span.start) as stream:
        number, offset = 0, stream.tell()
        while (span.stop is None or offset < span.stop) and (line := stream.readline()):
            number, offset = number + 1, offset + len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                if not isinstance(row, dict):
                    raise SourceError(f"{span.place}: line {_lines_before(span) + number} is not a JSON object")
                yield text_of(row, settings.column, partial(_line_of, span, number))
            except UnicodeDecodeError:
                yield Document(line)
            except json.JSONDecodeError as error:
                line_number = _lines_before(span) + number
                raise SourceError(f"{span.place}: line {line_number} is not valid JSON ({error.msg})") from None


def _line_of(span: Span, number: int) -> str:
    return f"{span.place}: line {_lines_before(span) + number}"


def _lines_before(span: Span) -> int:
    """Count the lines of a file before a span, to say where a mistake is."""
    with open_raw(span.place) as file:
        lines, left = 0, span.start
        while left and (block := file.read(min(left, _BLOCK))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def text_of(row: Mapping[str, Any], column: str, place: Callable[[], str]) -> Document:
    """Return the document in a column of a row; null is an empty one."""
    if column not in row:
        raise SourceError(_column_missing(place(), column, row))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{place()}: column {column!r} holds {type(text).__name__}, not text; set data.column")
    return Document(text or "")


def _column_missing(place: str, column: str, names: Iterable[str]) -> str:
    return f"{place}: no column {column!r}; set data.column to one of {', '.join(map(repr, names))}"


# Parquet: a document in a column of each row.


def _cut_table(place: str, stamp: Stamp, settings: DataSettings, step: int) -> Iterator[Span]:
    with _open_table(place) as table:
        _check_column(place, table, settings.column)
        sizes = [_text_size(table.metadata.row_group(group), settings.column) for group in range(table.num_row_groups)]
    start = size = 0
    for group, more in enumerate(sizes):
        size += more
        if size >= step or group == len(sizes) - 1:
            yield Span(".parquet", place, start, group + 1, size, stamp)
            start, size = group + 1, 0


def _text_size(group: Any, column: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(part.total_uncompressed_size for part in columns if part.path_in_schema.partition(".")[0] == column)


def _read_table(span: Span, settings: DataSettings) -> Iterator[Document]:
    with _open_table(span.place) as table:
        _check_column(span.place, table, settings.column)
        groups: Sequence[int] = range(table.num_row_groups)[span.start : span.stop]
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=[settings.column]):
            for row in batch.to_pylist():
                yield text_of(row, settings.column, lambda: span.place)


@contextmanager
def _open_table(place: str) -> Iterator[Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("pyarrow", "sources", f"reading {place.rpartition('/')[2]}") from None
    try:
        with open_raw(place) as file, parquet.ParquetFile(file) as table:
            yield table
    except arrow.ArrowException as error:
        raise SourceError(f"{place}: not a readable Parquet file ({error})") from None


def _check_column(place: str, table: Any, column: str) -> None:
    names = table.schema_arrow.names
    if column not in names:
        raise SourceError(_column_missing(place, column, names))


FORMATS: dict[str, Format] = {
    ".txt": Format(_cut_text, _read_text),
    ".jsonl": Format(_cut_lines, _read_lines),
    ".parquet": Format(_cut_table, _read_table),
}
