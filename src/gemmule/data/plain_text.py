"""Text files: documents between separators; splitting a file into byte ranges, and reading a range."""

import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from gemmule.data.documents import Document, FileRange
from gemmule.data.settings import DataSettings
from gemmule.data.streams import File, FileVersion, open_bytes, open_raw

LONGEST = 1 << 20  # bytes; a longer document is split at line ends, so that memory stays bounded
BLOCK = 1 << 20

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


class Separator(NamedTuple):
    """The separator between documents."""

    text: str
    pattern: re.Pattern[bytes]
    longest: int  # bytes of a match

    @classmethod
    def of(cls, typed: str) -> "Separator":
        r"""Return the separator of a setting; the escapes \n, \r, \t and \\ are expanded.

        A line end in it matches LF and CRLF, which cleaning normalizes.
        """
        text = re.sub(r"\\[nrt\\]", lambda found: _ESCAPES[found[0]], typed).replace("\r\n", "\n")
        raw = text.encode(errors="surrogateescape")
        if b"\r" in raw:  # explicit line ends
            return cls(text, re.compile(re.escape(raw)), len(raw))
        return cls(text, re.compile(rb"\r?\n".join(map(re.escape, raw.split(b"\n")))), len(raw) + raw.count(b"\n"))


LINE_END = Separator("\n", re.compile(b"\n"), 1)


def split_text(file: File, version: FileVersion, settings: DataSettings, step: int) -> Iterator[FileRange]:
    """Yield byte ranges of a text file, each of which ends after a separator."""
    yield from split_after(Separator.of(settings.separator), file, version, step)


def split_after(separator: Separator, file: File, version: FileVersion, step: int) -> Iterator[FileRange]:
    """Yield ranges of about `step` bytes, each of which ends after a separator."""
    start = 0
    with open_raw(file) as stream:
        while start < version.size:
            stop = end_of_separator(stream, separator, start + step) if start + step < version.size else None
            yield FileRange(file, start, stop, (stop or version.size) - start, version)
            start = stop or version.size


def end_of_separator(file: IO[bytes], separator: Separator, start: int) -> int | None:
    """Return the end of the first separator at or after `start` that a sequential read from 0 also finds; None if none.

    Overlapping separators ("\\n\\n" in "\\n\\n\\n") are ambiguous from the middle of a file and are skipped.
    """
    begin = max(0, start - separator.longest + 1)
    ended = 0  # end of the last separator found
    file.seek(begin)
    text = b""
    while block := file.read(BLOCK):
        text += block
        found = separator.pattern.search(text)
        while found:
            if begin + found.start() >= max(start, ended):
                return begin + found.end()
            ended = begin + found.end()
            found = separator.pattern.search(text, found.start() + 1)
        kept = min(len(text), separator.longest - 1)
        begin += len(text) - kept
        text = text[len(text) - kept :]
    return None


def read_text(file_range: FileRange, settings: DataSettings) -> Iterator[Document]:
    """Yield the documents of a byte range of a text file."""
    with open_bytes(file_range.file, file_range.start) as stream:
        for piece in split_stream(stream, Separator.of(settings.separator), stop=file_range.stop):
            try:
                yield Document(piece.text.decode(), separated=piece.separated)
            except UnicodeDecodeError as error:
                yield Document(piece.text, invalid_at=piece.offset + error.start, separated=piece.separated)


class Piece(NamedTuple):
    """A document of a text file, or a piece of one that is longer than the limit."""

    offset: int
    text: bytes
    separated: bool  # whether a separator follows


def split_stream(
    stream: IO[bytes], separator: Separator, longest: int = LONGEST, stop: int | None = None
) -> Iterator[Piece]:
    """Yield the documents between separators up to byte `stop`; memory: a block and a document.

    Documents longer than `longest` bytes are split after a line end, or else between two characters.
    """
    offset, rest = stream.tell(), b""
    while block := stream.read(BLOCK if stop is None else min(BLOCK, stop - stream.tell())):
        rest += block
        begin = 0
        while found := separator.pattern.search(rest, begin):
            yield from _split_long(offset + begin, rest[begin : found.start()], longest, separated=True)
            begin = found.end()
        offset, rest = offset + begin, rest[begin:]
        # A possible beginning of a separator is left for the next block.
        while len(rest) > longest + separator.longest:
            end = _split_point(rest, longest)
            yield Piece(offset, rest[:end], False)
            offset, rest = offset + end, rest[end:]
    if rest.strip():
        yield from _split_long(offset, rest, longest, separated=False)


def _split_long(offset: int, document: bytes, longest: int, separated: bool) -> Iterator[Piece]:
    while len(document) > longest:
        end = _split_point(document, longest)
        yield Piece(offset, document[:end], False)
        offset, document = offset + end, document[end:]
    yield Piece(offset, document, separated)


def _split_point(text: bytes, longest: int) -> int:
    line_end = text.rfind(b"\n", 0, longest) + 1
    if line_end:
        return line_end
    # A byte 10xxxxxx continues a character; valid UTF-8 has at most three of them in a row.
    return next((end for end in range(longest, max(longest - 4, 0), -1) if text[end] & 0xC0 != 0x80), longest)
