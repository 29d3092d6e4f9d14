"""What reading yields: documents, the file ranges that hold them, and statistics of reading them."""

from collections.abc import Iterator
from typing import NamedTuple

from gemmule.data.report import counted
from gemmule.data.streams import File, FileVersion
from gemmule.errors import SourceError

_MAX_INVALID = 0.01  # the largest share of a file's documents that may be invalid UTF-8
_NAMED = 3  # files that a message names, before it counts


class Document(NamedTuple):
    """One document as stored in its source."""

    text: str | bytes  # bytes where it is invalid UTF-8
    log_probability: float | None = None  # nats, where the source knows it; such a text must not be changed
    invalid_at: int | None = None  # byte offset in a text file of the first invalid byte
    separated: bool | None = None  # in a text file: whether a separator follows
    chat: bool = False  # rendered from a column of messages


class FileRange(NamedTuple):
    """A byte range of a file, or the row groups of a Parquet file, read sequentially by one process."""

    file: File
    start: int = 0  # byte; row group of a Parquet file
    stop: int | None = None  # None: to the end
    size: int = 0  # bytes of text, approximately
    version: FileVersion | None = None  # of the file when the range was planned

    @property
    def origin(self) -> str:
        """The name of the file in messages."""
        return str(self.file)


class ReadStats(NamedTuple):
    """Statistics of reading the documents of a file, or of a byte range of one: encoding errors, separators, chats."""

    documents: int = 0
    invalid: int = 0  # documents that are invalid UTF-8
    first_invalid: int | None = None  # byte offset of the first invalid byte
    separated: bool | None = None  # in a text file: whether a separator was found
    chats: int = 0  # documents rendered from messages

    def add(self, document: Document) -> "ReadStats":
        """Return the statistics with one more document."""
        invalid = document.invalid_at is not None
        return self.merge(ReadStats(1, int(invalid), document.invalid_at, document.separated, int(document.chat)))

    def merge(self, later: "ReadStats") -> "ReadStats":
        """Return the statistics of this range and the one that follows it."""
        return ReadStats(
            self.documents + later.documents,
            self.invalid + later.invalid,
            later.first_invalid if self.first_invalid is None else self.first_invalid,
            self.separated or (self.separated if later.separated is None else later.separated),
            self.chats + later.chats,
        )


class ReadWarnings:
    """Collects what the user should know about the files read, to be reported in few messages."""

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._unseparated: dict[str, int] = {}  # files without a separator: their documents
        self._chats: dict[str, int] = {}

    def add(self, file: str, stats: ReadStats) -> None:
        """Add the statistics of a whole file; SourceError where it is not UTF-8 text."""
        check_encoding(file, stats)
        if stats.separated is False:
            self._unseparated[file] = stats.documents
        if stats.chats:
            self._chats[file] = stats.chats

    def messages(self) -> Iterator[str]:
        """Yield the messages for the user."""
        if self._unseparated:
            each = "it is" if len(self._unseparated) == 1 else "each is"
            longer = (
                ", split where it is longer than 1 MiB"
                if any(count > 1 for count in self._unseparated.values())
                else ""
            )
            yield (
                f"the separator {self._separator!r} does not occur in {_named(list(self._unseparated))}: "
                f"{each} read as one document{longer}"
            )
        if self._chats:
            chats = counted(sum(self._chats.values()), "message list")
            yield f"{_named(list(self._chats))}: {chats} rendered as lines 'role: content'"


def _named(files: list[str]) -> str:
    if len(files) == 1:
        return files[0]
    return f"{len(files):,} files ({', '.join(files[:_NAMED])}{', ...' if len(files) > _NAMED else ''})"


def check_encoding(file: str, stats: ReadStats) -> None:
    """Raise SourceError where more than 1 % of the documents of a file are invalid UTF-8."""
    if stats.invalid > _MAX_INVALID * stats.documents:
        raise SourceError(
            f"{file}: not UTF-8: {stats.invalid} of {stats.documents} documents, "
            f"the first at byte {stats.first_invalid}; convert it, for example with iconv -f WINDOWS-1252 -t UTF-8"
        )
