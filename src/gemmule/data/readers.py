"""Files of documents: a reader for each format, all streaming, and the decompression beneath them."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from gemmule.data.settings import DataSettings
from gemmule.errors import MissingExtra, SourceError

LONGEST = 1 << 20  # bytes; a longer document of a text file is cut at line ends, so that memory stays bounded
_BLOCK = 1 << 20
_TOLERATED = 0.01  # the share of a file's documents that may be invalid UTF-8 before the file is not text


class Document(NamedTuple):
    """One document as its source has it."""

    text: str | bytes  # bytes where it is not UTF-8
    log_probability: float | None = None  # nats, where the source knows it; such a text is not to be changed


def read_file(file: Path, settings: DataSettings) -> Iterator[Document]:
    """Yield the documents of a file; raises SourceError where it is damaged or not what its name says."""
    with _damage_explained(file):
        yield from FORMATS[format_of(file)](file, settings)


def format_of(file: Path) -> str:
    """Return the ending that says what a file holds, below its compression."""
    return (file.with_suffix("") if file.suffix in COMPRESSIONS else file).suffix


def _read_text(file: Path, settings: DataSettings) -> Iterator[Document]:
    documents = 0
    invalid: list[int] = []  # the place of the first wrong byte of each document that has one
    with _open(file) as stream:
        for offset, raw in split_stream(stream, settings.separator.encode()):
            documents += 1
            try:
                yield Document(raw.decode())
            except UnicodeDecodeError as error:
                invalid.append(offset + error.start)
                yield Document(raw)
    if len(invalid) > _TOLERATED * documents:
        raise SourceError(
            f"{file}: not UTF-8: {len(invalid)} of {documents} documents, the first at byte {invalid[0]}; "
            "convert it, for instance with iconv -f WINDOWS-1252 -t UTF-8"
        )


def split_stream(stream: IO[bytes], separator: bytes, longest: int = LONGEST) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, document) for what stands between separators; memory holds one block and one document.

    Documents longer than `longest` bytes are cut after a line end, or else anywhere between two characters.
    """
    offset, rest = stream.tell(), b""
    while block := stream.read(_BLOCK):
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


def _read_json_lines(file: Path, settings: DataSettings) -> Iterator[Document]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError:
                yield Document(line)
                continue
            except json.JSONDecodeError as error:
                raise SourceError(f"{file}: line {number} is not valid JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise SourceError(f"{file}: line {number} is not a JSON object")
            yield text_of(row, settings.column, f"{file}: line {number}")


def _read_parquet(file: Path, settings: DataSettings) -> Iterator[Document]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("pyarrow", "sources", f"reading {file.name}") from None
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if settings.column not in names:
                raise SourceError(_column_missing(str(file), settings.column, names))
            for batch in table.iter_batches(batch_size=1024, columns=[settings.column]):
                for row in batch.to_pylist():
                    yield text_of(row, settings.column, str(file))
    except arrow.ArrowException as error:
        raise SourceError(f"{file}: not a readable Parquet file ({error})") from None


def text_of(row: Mapping[str, Any], column: str, place: str) -> Document:
    """Return the document in a column of a row; null is an empty one."""
    if column not in row:
        raise SourceError(_column_missing(place, column, row))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{place}: column {column!r} holds {type(text).__name__}, not text; set data.column")
    return Document(text or "")


def _column_missing(place: str, column: str, names: Iterable[str]) -> str:
    return f"{place}: no column {column!r}; set data.column to one of {', '.join(map(repr, names))}"


FORMATS: dict[str, Callable[[Path, DataSettings], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def _open_zstd(file: Path) -> io.BufferedReader:
    return io.BufferedReader(_zstandard(file).open(file, "rb"))


def _zstandard(file: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("zstandard", "sources", f"reading {file.name}") from None
    return zstandard


COMPRESSIONS: dict[str, Callable[[Path], io.BufferedReader]] = {
    ".gz": lambda file: io.BufferedReader(gzip.GzipFile(file)),
    ".zst": _open_zstd,
}


@contextmanager
def _open(file: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading its uncompressed bytes, after a UTF-8 byte-order mark if it has one."""
    with COMPRESSIONS[file.suffix](file) if file.suffix in COMPRESSIONS else file.open("rb") as stream:
        start = stream.peek(3)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise SourceError(
                f"{file}: not UTF-8 but UTF-16 (byte-order mark at byte 0); convert it with iconv -f UTF-16 -t UTF-8"
            )
        if start.startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        yield stream
        if file.suffix == ".zst":
            _check_frame_was_whole(file, stream.tell())


def _check_frame_was_whole(file: Path, size: int) -> None:
    # The library ends the stream of a truncated file without a word.
    with file.open("rb") as frame:
        expected = _zstandard(file).frame_content_size(frame.read(18))  # the longest header; -1 where it does not tell
    if size < expected:
        raise SourceError(f"{file}: truncated: {size} bytes of text, expected {expected}; fetch it anew")


@contextmanager
def _damage_explained(file: Path) -> Iterator[None]:
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if file.suffix == ".zst":
        damage += (_zstandard(file).ZstdError,)
    try:
        yield
    except damage as error:
        raise SourceError(f"{file}: cannot be read ({error.args[-1] if error.args else error})") from error
