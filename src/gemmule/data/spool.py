"""Spooling: standard input and pipes are copied to a temporary file, which several processes can seek in."""

import atexit
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from gemmule.data.plain_text import BLOCK
from gemmule.data.readers import FORMATS
from gemmule.data.streams import File, open_bytes, read_errors
from gemmule.errors import SourceError
from gemmule.files import as_output_error
from gemmule.reading import local_path, path_kind

_PEEKED = 1 << 16  # bytes: the beginning from which the format is guessed
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}


def is_stream(source: str) -> bool:
    """Whether a SOURCE is standard input ("-"), a pipe or a device, which can be read only once."""
    path = local_path(source)
    names_one = source == "-" or path == Path("/dev/stdin") or path.is_relative_to("/dev/fd")
    return names_one or path_kind(path) == "other"


@cache
def spool(source: str) -> File:
    """Copy a stream to a temporary file, deleted when this process ends; return the file.

    Its format is taken from the name, or else guessed from the beginning: Parquet, JSON Lines, JSON, or text. Raises
    SourceError where the stream is empty, OutputError where the copy cannot be written.
    """
    stem = f"{'standard-input' if source == '-' else Path(source).stem}-{len(list(_folder().iterdir()))}"
    path = _folder() / stem
    with as_output_error(path), path.open("wb") as copy:
        for block in _blocks(source):
            copy.write(block)
    with path.open("rb") as copy:
        head = copy.read(4)
    if not head:
        raise SourceError(f"{source}: the stream is empty")
    compression = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), "")
    path = path.rename(path.with_name(stem + compression))
    if compression == ".parquet":
        return File(str(path))
    suffix = File(source).suffix
    if suffix not in FORMATS:
        with read_errors(File(str(path))), open_bytes(File(str(path))) as text:
            suffix = _suffix_of(text.read(_PEEKED))
    return File(str(path.rename(path.with_name(stem + suffix + compression))))


def _blocks(source: str) -> Iterator[bytes]:
    with read_errors(File(source)):
        if source == "-" and sys.stdin is None:
            raise SourceError("-: standard input is closed")
        with nullcontext(sys.stdin.buffer) if source == "-" else local_path(source).open("rb") as stream:
            while block := stream.read(BLOCK):
                yield block


@cache
def _folder() -> Path:
    folder = Path(mkdtemp(prefix="gemmule-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _suffix_of(head: bytes) -> str:
    """Guess the format of text from its beginning; return its suffix."""
    text = head.lstrip()
    first = text.partition(b"\n")[0]
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(first), dict):
            return ".jsonl"
    return ".json" if text[:1] + text[1:].lstrip()[:1] in (b'{"', b"[{") else ".txt"
