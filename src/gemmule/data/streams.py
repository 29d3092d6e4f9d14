"""Opening files, local or on the Hugging Face Hub, with decompression; read errors become SourceErrors."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from gemmule.errors import MissingExtra, SourceError, UserError

_MAX_WINDOW = 1 << 29  # bytes: the largest window of a .zst that is decompressed; `zstd --long=29` and below
_ZSTD_BLOCK = 4096  # compressed bytes per read: they expand to at most 128 MiB


class File(NamedTuple):
    """A file to read: local, or in a dataset repository of the Hugging Face Hub."""

    path: str  # on the Hub: owner/name/FILE
    on_hub: bool = False

    @property
    def suffix(self) -> str:
        """The suffix of the format, without that of the compression; in lower case."""
        return Path(self.path.removesuffix(Path(self.path).suffix) if self.compression else self.path).suffix.lower()

    @property
    def compression(self) -> str:
        """The suffix of the compression, empty where there is none; a compressed file is read sequentially."""
        suffix = Path(self.path).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    def __str__(self) -> str:
        return f"hf:{self.path}" if self.on_hub else self.path


class FileVersion(NamedTuple):
    """Identifies the contents of a file, to detect a change."""

    size: int  # bytes
    revision: str  # modification time in ns, or the Hub's blob id


def file_version(file: File) -> FileVersion:
    """Return the version of a file; raises SourceError where it does not exist."""
    with read_errors(file):
        if file.on_hub:
            details = hub_files().info(_HUB + file.path)
            return FileVersion(int(details["size"]), str(details.get("blob_id", "")))
        status = Path(file.path).stat()
        return FileVersion(status.st_size, str(status.st_mtime_ns))


_HUB = "datasets/"  # prefix of dataset repositories in the Hub's file system


def hub_files() -> Any:
    """Return the file system of the Hugging Face Hub, which fetches byte ranges on demand."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "sources", "reading files of the Hugging Face Hub") from None
    return huggingface_hub.HfFileSystem()


@contextmanager
def open_raw(file: File) -> Iterator[IO[bytes]]:
    """Open a file for reading its raw bytes, without decompression."""
    with hub_files().open(_HUB + file.path, "rb") if file.on_hub else Path(file.path).open("rb") as stream:
        yield stream


@contextmanager
def open_bytes(file: File, start: int = 0) -> Iterator[IO[bytes]]:
    """Open a file for reading its decompressed bytes from byte `start`; a UTF-8 byte-order mark is skipped."""
    with open_raw(file) as raw:
        if file.compression:
            with COMPRESSIONS[file.compression](raw, file) as stream:
                yield _skip_bom(stream, file)
        elif start:
            raw.seek(start)
            yield raw
        else:
            yield _skip_bom(io.BufferedReader(raw), file)  # type: ignore[arg-type]


def _skip_bom(stream: io.BufferedReader, file: File) -> io.BufferedReader:
    mark = stream.peek(3)
    if mark.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(
            f"{file}: not UTF-8 but UTF-16 (byte-order mark at byte 0); convert it with iconv -f UTF-16 -t UTF-8"
        )
    if mark.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
    return stream


def _open_gzip(raw: IO[bytes], _file: File) -> AbstractContextManager[io.BufferedReader]:
    return nullcontext(io.BufferedReader(gzip.GzipFile(fileobj=raw)))


def _open_zstd(raw: IO[bytes], file: File) -> AbstractContextManager[io.BufferedReader]:
    return nullcontext(io.BufferedReader(_ZstdFrames(raw, file)))


class _ZstdFrames(io.RawIOBase):
    """A .zst file, decompressed frame by frame: the library reports no error at the end of a truncated frame."""

    def __init__(self, raw: IO[bytes], file: File) -> None:
        self._raw = raw
        self._library = _zstandard(file).ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self._frame = self._library.decompressobj()
        self._in_frame = False
        self._compressed = self._text = b""
        self._position = 0  # decompressed bytes read

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._raw.read(_ZSTD_BLOCK)
            if not self._compressed:
                if self._in_frame:
                    raise EOFError("truncated: it ends within a compressed frame; download it again")
                return 0
            self._text = self._frame.decompress(self._compressed)
            self._in_frame = not self._frame.eof
            self._compressed = b"" if self._in_frame else self._frame.unused_data
            if not self._in_frame:
                self._frame = self._library.decompressobj()
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        self._position += count
        return count


def _zstandard(file: File) -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("zstandard", "sources", f"reading {Path(file.path).name}") from None
    return zstandard


COMPRESSIONS: dict[str, Callable[[IO[bytes], File], AbstractContextManager[io.BufferedReader]]] = {
    ".gz": _open_gzip,
    ".zst": _open_zstd,
}


@contextmanager
def read_errors(file: File) -> Iterator[None]:
    """Raise read errors of a file (missing, truncated, damaged) as a SourceError that names it."""
    with hub_errors(str(file)) if file.on_hub else nullcontext():
        errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
        if file.compression == ".zst":
            errors += (_zstandard(file).ZstdError,)
        try:
            yield
        except errors as error:
            if "too much memory" in str(error):  # a window above _MAX_WINDOW
                limit = f"decompressing it takes more than {_MAX_WINDOW >> 20} MiB of memory"
                advice = f"decompress it first: zstd -d --long=31 {Path(file.path).name}"
                raise SourceError(f"{file}: {limit}; {advice}") from error
            if file.on_hub:
                raise
            raise SourceError(f"{file}: cannot be read ({error.args[-1] if error.args else error})") from error


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Raise any error of reading from the Hugging Face Hub as a SourceError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the library, its HTTP client, or the reader of the file
        reason = next(iter(str(error).splitlines()), "")
        advice = "check the name and the network, or name a local copy"
        raise SourceError(
            f"{source}: cannot be read from the Hugging Face Hub ({type(error).__name__}: {reason}); {advice}"
        ) from error
