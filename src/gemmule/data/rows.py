"""Row formats (JSON Lines, JSON, CSV, TSV, Parquet): one document per row, in a column."""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from gemmule.data.conversations import COLUMNS, check_columns, row_document
from gemmule.data.documents import Document, FileRange
from gemmule.data.plain_text import BLOCK, LINE_END, split_after
from gemmule.data.settings import DataSettings
from gemmule.data.streams import File, FileVersion, open_bytes, open_raw
from gemmule.errors import MissingExtra, SourceError

LARGEST = 64 << 20  # the longest line of JSON Lines or CSV in bytes, the longest JSON object in characters
_CHATS = "messages"  # the column read where data.column does not exist
_NAMED = 20  # columns that a message names


def document_of(
    row: Mapping[str, Any], settings: DataSettings, where: Callable[[], str], known: bool = False
) -> Document:
    """Return the document of a row of `settings.kind`: its text, or the canonical JSON of a conversation."""
    if settings.kind == "text":
        return text_of(row, settings.column, where, known)
    return row_document(row, settings, where)


def text_of(row: Mapping[str, Any], column: str, where: Callable[[], str], known: bool = False) -> Document:
    """Return the document in a column of a row, also `outer.inner`; null is an empty document, messages are rendered.

    `where` names the row in errors, `known` is whether earlier rows had the column. Raises SourceError.
    """
    value = _value_of(row, column)
    if value is _MISSING:
        value = row.get(_CHATS)
        if not isinstance(value, list):
            raise SourceError(_column_missing(where(), column, row, known))
    if value is None or isinstance(value, str):
        return Document(value or "")
    chat = render_chat(value)
    if chat is None:
        kind = type(value).__name__
        raise SourceError(f"{where()}: column {column!r} holds {kind}, not text or messages; set data.column")
    return Document(chat, chat=True)


_MISSING = object()


def _value_of(row: Mapping[str, Any], column: str) -> Any:
    """Look up a column by its name or by a dotted path; `_MISSING` where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            return _MISSING
        value = value[name]
    return value


def render_chat(messages: Any) -> str | None:
    """Render messages as lines "role: content"; None where the value is not a list of messages.

    The content of a message is text, null, or a list of text parts.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        return None
    lines = []
    for message in messages:
        role, content = message.get("role"), message.get("content", _MISSING)
        if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
            content = "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
        if not isinstance(role, str) or not isinstance(content, str | None):
            return None
        lines.append(f"{role}: {content or ''}")
    return "\n".join(lines)


def _column_missing(where: str, column: str, names: Iterable[str], known: bool = False) -> str:
    shown = ", ".join(map(repr, list(names)[:_NAMED]))
    if known:
        return f"{where}: no column {column!r}, which earlier rows have; it has {shown or 'none'}"
    return f"{where}: no column {column!r}; set data.column (--column) to one of {shown}"


def _lines(stream: IO[bytes], where: Callable[[int], str], stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line up to `stop`; SourceError where a line is too long."""
    number, offset = 0, stream.tell()
    while (stop is None or offset < stop) and (line := stream.readline(LARGEST + 1)):
        number, offset = number + 1, offset + len(line)
        if len(line) > LARGEST:
            raise SourceError(f"{where(number)} is longer than the limit of {LARGEST >> 20} MiB")
        yield number, line


# JSON Lines.


def split_lines(file: File, version: FileVersion, _settings: DataSettings, step: int) -> Iterator[FileRange]:
    """Yield byte ranges of whole lines."""
    yield from split_after(LINE_END, file, version, step)


def read_lines(file_range: FileRange, settings: DataSettings) -> Iterator[Document]:
    """Yield the document of each line of a range."""
    where, known = partial(_line_of, file_range), file_range.start > 0
    with open_bytes(file_range.file, file_range.start) as stream:
        for number, line in _lines(stream, where, file_range.stop):
            if not line.strip():
                continue
            try:
                row = _parse_line(line.decode())
            except UnicodeDecodeError:
                yield Document(line)
                continue
            except _InvalidError as error:
                raise SourceError(f"{where(number)} is not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise SourceError(f"{where(number)} is not a JSON object")
            yield document_of(row, settings, partial(where, number), known)
            known = True


def _line_of(file_range: FileRange, number: int) -> str:
    """Name a line of a range by its number in the file."""
    with open_raw(file_range.file) as stream:
        before, left = 0, file_range.start
        while left and (block := stream.read(min(left, BLOCK))):
            before += block.count(b"\n")
            left -= len(block)
    return f"{file_range.file}: line {before + number}"


def _parse_line(line: str) -> Any:
    row, end = _parse(line, 0)
    if line[end:].strip():
        raise _InvalidError("Extra data")
    return row


class _InvalidError(ValueError):
    """Text is not valid JSON."""


_CONTINUES = ("", *"0123456789.eE+-")  # characters that may continue a number
_TOO_DEEP = "nested too deeply"
_JSON, _JSON_OF_LARGE_NUMBERS = json.JSONDecoder(), json.JSONDecoder(parse_int=float)


def _parse(text: str, start: int) -> tuple[Any, int]:
    """Parse the JSON value at `start`; return it and its end. Raises _InvalidError with the reason."""
    while text[start : start + 1] in (" ", "\t", "\n", "\r"):
        start += 1
    try:
        try:
            return _JSON.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _InvalidError(error.msg) from None
        except ValueError:  # an integer with more digits than Python's limit
            return _JSON_OF_LARGE_NUMBERS.raw_decode(text, start)
    except RecursionError:
        raise _InvalidError(_TOO_DEEP) from None


# JSON: a list of objects, {"data": [...]}, a single object, or several of these concatenated.


def read_json(file_range: FileRange, settings: DataSettings) -> Iterator[Document]:
    """Yield the document of each object of a file, parsed incrementally: memory holds one object."""
    with open_bytes(file_range.file) as stream:
        for number, row in enumerate(_JsonText(stream, file_range.file).rows(), 1):
            where = partial("{}: object {}".format, file_range.file, number)
            if not isinstance(row, dict):
                raise SourceError(f"{where()} is not a JSON object but {type(row).__name__}")
            yield document_of(row, settings, where, known=number > 1)


class _JsonText:
    """An incremental JSON parser: reads a stream as far as needed."""

    def __init__(self, stream: IO[bytes], file: File) -> None:
        self._stream, self._file = stream, file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._index, self._before, self._ended = "", 0, 0, False

    def rows(self) -> Iterator[Any]:
        """Yield the elements of top-level lists, and top-level objects."""
        while first := self._peek():
            if first == "[":
                yield from self._elements()
            elif first == "{":
                yield from self._object()
            else:
                yield self._value()

    def _elements(self) -> Iterator[Any]:
        yield from (self._value() for _ in self._items("[", "]"))

    def _object(self) -> Iterator[Any]:
        """Yield an object, or else the elements of its list `data`."""
        row: dict[str, Any] = {}
        listed, start = False, self._before + self._index
        for _ in self._items("{", "}"):
            name = self._value()
            self._take(":")
            if name == "data" and self._peek() == "[":
                listed = True
                yield from self._elements()
                start = self._before + self._index
                continue
            row[name] = self._value()
            if self._before + self._index - start > LARGEST:
                raise self._invalid(f"an object longer than the limit of {LARGEST >> 20} MiB")
        if not listed:
            yield row

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Consume brackets and commas; yield at the start of each item."""
        self._take(opening)
        if self._peek() != closing:
            yield
            while self._peek() != closing:
                self._take(",")
                yield
        self._take(closing)

    def _value(self) -> Any:
        """Parse the next value of any type."""
        self._peek()
        while True:
            reason = ""
            try:
                value, end = _parse(self._text, self._index)
                if self._ended or self._text[end : end + 1] not in _CONTINUES:
                    self._index = end
                    return value
            except _InvalidError as error:
                reason = str(error)
                if self._ended or reason == _TOO_DEEP:
                    raise self._invalid(reason) from None
            if len(self._text) - self._index > LARGEST:
                raise self._invalid(f"{reason or 'a number'}, or a value longer than the limit of {LARGEST >> 20} MiB")
            self._read_more()

    def _read_more(self) -> None:
        """At least double the unparsed text, so that parsing it again costs amortized constant time."""
        left = self._text[self._index :]
        more = self._stream.read(max(BLOCK, len(left)))
        self._ended = not more
        self._before += self._index
        self._text, self._index = left + self._decoder.decode(more, final=self._ended), 0

    def _peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            while self._index < len(self._text) and self._text[self._index] in " \t\n\r":
                self._index += 1
            if self._index < len(self._text) or self._ended:
                return self._text[self._index : self._index + 1]
            self._read_more()

    def _take(self, expected: str) -> None:
        found = self._peek()
        if found != expected:
            raise self._invalid(f"{found!r} where {expected!r} is expected" if found else "truncated")
        self._index += 1

    def _invalid(self, reason: str) -> SourceError:
        return SourceError(f"{self._file}: not valid JSON at character {self._before + self._index} ({reason})")


# CSV and TSV: records below a header line.


def read_csv(file_range: FileRange, settings: DataSettings) -> Iterator[Document]:
    """Yield the document of each comma-separated record."""
    return _read_records(file_range, settings, ",")


def read_tsv(file_range: FileRange, settings: DataSettings) -> Iterator[Document]:
    """Yield the document of each tab-separated record."""
    return _read_records(file_range, settings, "\t")


def _read_records(file_range: FileRange, settings: DataSettings, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(LARGEST)

    def where(number: int) -> str:
        return f"{file_range.file}: line {number}"

    with open_bytes(file_range.file) as stream:
        lines = (line.decode(errors="surrogateescape") for _, line in _lines(stream, where))
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(records, [])
            if settings.kind != "text":
                check_columns(names, settings, where(1))
            elif _value_of(dict.fromkeys(names), settings.column) is _MISSING:
                if any(other in name for name in names for other in ";\t|"):
                    advice = "save it with commas, or with tabs as .tsv"
                    raise SourceError(f"{where(1)}: the columns do not seem to be separated by {delimiter!r}; {advice}")
                raise SourceError(_column_missing(where(1), settings.column, names))
            for values in records:
                if not values:
                    continue
                if len(values) != len(names):
                    fields = f"{len(values)} fields, where the header has {len(names)} columns"
                    raise SourceError(f"{where(records.line_num)}: {fields}; quote fields with a {delimiter!r}")
                yield document_of(dict(zip(names, values, strict=True)), settings, partial(where, records.line_num))
        except csv.Error as error:
            advice = 'a field that contains " must be quoted, with each " inside it doubled'
            raise SourceError(f"{where(records.line_num)}: not valid CSV ({error}): {advice}") from None


# Parquet.


def split_table(file: File, version: FileVersion, settings: DataSettings, step: int) -> Iterator[FileRange]:
    """Yield ranges of whole row groups."""
    with _open_table(file) as table:
        columns = _columns_to_read(file, table, settings)
        sizes = [_text_size(table.metadata.row_group(group), columns) for group in range(table.num_row_groups)]
    start = size = 0
    for group, more in enumerate(sizes):
        size += more
        if size >= step or group == len(sizes) - 1:
            yield FileRange(file, start, group + 1, size, version)
            start, size = group + 1, 0


def _text_size(group: Any, columns: Sequence[str]) -> int:
    parts = (group.column(number) for number in range(group.num_columns))
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.partition(".")[0] in columns)


def read_table(file_range: FileRange, settings: DataSettings) -> Iterator[Document]:
    """Yield the document of each row of a range."""
    with _open_table(file_range.file) as table:
        columns = _columns_to_read(file_range.file, table, settings)
        groups: Sequence[int] = range(table.num_row_groups)[file_range.start : file_range.stop]
        metadata = [table.metadata.row_group(group) for group in groups]
        largest = max((_text_size(group, columns) // max(1, group.num_rows) for group in metadata), default=0)
        batch_size = max(1, min(1024, LARGEST // max(1, largest)))
        number = sum(table.metadata.row_group(group).num_rows for group in range(file_range.start))
        for batch in table.iter_batches(batch_size=batch_size, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield document_of(row, settings, partial("{}: row {}".format, file_range.file, number))


@contextmanager
def _open_table(file: File) -> Iterator[Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("pyarrow", "sources", f"reading {file.path.rpartition('/')[2]}") from None
    try:
        with open_raw(file) as stream, parquet.ParquetFile(stream) as table:
            yield table
    except arrow.ArrowException as error:
        raise SourceError(f"{file}: not a readable Parquet file ({error})") from None


def _columns_to_read(file: File, table: Any, settings: DataSettings) -> list[str]:
    """Return the top-level columns to read; SourceError where there are none."""
    names, column = table.schema_arrow.names, settings.column
    if settings.kind != "text":
        check_columns(names, settings, str(file))
        wanted = COLUMNS[settings.kind]
        return [name for name in names if wanted is None or name in wanted or name == column]
    for name in (column, column.partition(".")[0], _CHATS):
        if name in names:
            return [str(name)]
    raise SourceError(_column_missing(str(file), column, names))
