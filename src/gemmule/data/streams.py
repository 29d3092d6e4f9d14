"""The bytes of a file, here or on the Hugging Face Hub, below its compression; what is wrong with it is said."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from gemmule.errors import MissingExtra, SourceError

HUB = "datasets/"  # how the place of a file in a dataset repository of the Hub begins; any other is a path


class Stamp(NamedTuple):
    """What tells that a file is the one it was."""

    size: int  # bytes
    version: str  # time of its last change, or the Hub's own


def stamp_of(place: str) -> Stamp:
    """Return a file's stamp; raises SourceError where it is not there."""
    with damage_explained(place):
        if place.startswith(HUB):
            details = hub_files().info(place)
            return Stamp(int(details["size"]), str(details.get("blob_id", "")))
        status = Path(place).stat()
        return Stamp(status.st_size, str(status.st_mtime_ns))


def hub_files() -> Any:
    """Return the files of the Hugging Face Hub, which are read in pieces as they are needed."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "sources", "reading files of the Hugging Face Hub") from None
    return huggingface_hub.HfFileSystem()


def ending_of(place: str) -> str:
    """Return the ending that says what a file holds, below its compression."""
    path = Path(place)
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def is_compressed(place: str) -> bool:
    """Whether a file has to be read from its beginning."""
    return Path(place).suffix in COMPRESSIONS


@contextmanager
def open_raw(place: str) -> Iterator[IO[bytes]]:
    """Open a file for reading its bytes as they are stored."""
    with hub_files().open(place, "rb") if place.startswith(HUB) else Path(place).open("rb") as file:
        yield file


@contextmanager
def open_bytes(place: str, start: int = 0) -> Iterator[IO[bytes]]:
    """Open a file for reading its uncompressed bytes from `start` on; a UTF-8 byte-order mark is passed over."""
    with open_raw(place) as file:
        if is_compressed(place):
            with COMPRESSIONS[Path(place).suffix](file, place) as stream:
                yield _after_mark(stream, place)
        elif start:
            file.seek(start)
            yield file
        else:
            yield _after_mark(io.BufferedReader(file), place)  # type: ignore[arg-type]


def _after_mark(stream: io.BufferedReader, place: str) -> io.BufferedReader:
    mark = stream.peek(3)
    if mark.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(
            f"{place}: not UTF-8 but UTF-16 (byte-order mark at byte 0); convert it with iconv -f UTF-16 -t UTF-8"
        )
    if mark.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
    return stream


@contextmanager
def _gunzipped(file: IO[bytes], _place: str) -> Iterator[io.BufferedReader]:
    yield io.BufferedReader(gzip.GzipFile(fileobj=file))


@contextmanager
def _unpacked(file: IO[bytes], place: str) -> Iterator[io.BufferedReader]:
    library = _zstandard(place)
    # The library ends the stream of a truncated file without a word; most frames say how much they hold.
    expected = library.frame_content_size(file.read(18))  # the longest header; -1 where it does not tell
    file.seek(0)
    stream = io.BufferedReader(library.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    yield stream
    if (size := stream.tell()) < expected:
        raise SourceError(f"{place}: truncated: {size} bytes of text, expected {expected}; fetch it anew")


def _zstandard(place: str) -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("zstandard", "sources", f"reading {Path(place).name}") from None
    return zstandard


COMPRESSIONS: dict[str, Callable[[IO[bytes], str], Any]] = {".gz": _gunzipped, ".zst": _unpacked}


@contextmanager
def damage_explained(place: str) -> Iterator[None]:
    """Turn whatever says that a file cannot be read into a SourceError that names it."""
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if place.endswith(".zst"):
        damage += (_zstandard(place).ZstdError,)
    try:
        yield
    except damage as error:
        raise SourceError(f"{place}: cannot be read ({error.args[-1] if error.args else error})") from error
