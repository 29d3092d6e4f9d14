"""JSON Lines files that are read while somebody writes them."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json

_CHUNK = 1 << 20  # bytes read at once
_LONGEST_LINE = 1 << 26  # bytes; what is longer is passed over
_TAIL = 256  # bytes before the place of reading that show whether the file was written anew


class GrowingFile:
    """A JSON Lines file of which each call reads what was appended since the one before."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode = path, 0
        self._offset, self._tail, self._rest, self._too_long = 0, b"", b"", False
        self.damaged = 0  # lines that are no JSON object

    def version(self) -> tuple[int, int, int]:
        """Return what changes whenever the file does."""
        try:
            status = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_size, status.st_mtime_ns)

    def was_rewritten(self) -> bool:
        """Whether what was read is no longer there: cut by a resumed run, replaced or removed. If so, start over."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                file.seek(max(0, self._offset - len(self._tail)))
                rewritten = (self._inode not in (0, status.st_ino)) or file.read(len(self._tail)) != self._tail
        except OSError:
            rewritten = bool(self._offset)
        if rewritten:
            self.__init__(self._path)  # type: ignore[misc]
        return rewritten

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of the lines that are complete by now, none where there is no file; OSError otherwise."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            self._inode = os.fstat(file.fileno()).st_ino
            file.seek(self._offset)
            while chunk := file.read(_CHUNK):
                self._offset += len(chunk)
                self._tail = (self._tail + chunk)[-_TAIL:]
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                for line in lines:
                    if not self._too_long and (parsed := self._parse(line)) is not None:
                        yield parsed
                    self._too_long = False
                if len(self._rest) > _LONGEST_LINE:
                    self._rest, self._too_long = b"", True
                    self.damaged += 1

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        if not line.strip(b"\0 \t\r"):  # zeros are what a power cut may leave
            return None
        try:
            parsed = from_json(line)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            self.damaged += 1
            return None
        return parsed
