"""Cleaned documents on disk, between the pass that reads them and the passes that use them."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

_RECORD = struct.Struct("<Qd")  # length of the text in bytes; log-probability, or NaN where it is not known


class Spooled(NamedTuple):
    """A document as it comes back."""

    text: str
    size: int  # bytes of UTF-8
    log_probability: float | None


class Spool:
    """A list of documents of which memory holds none; close it, then iterate."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self.documents = 0
        self.bytes = 0

    def append(self, text: str, log_probability: float | None) -> None:
        """Write a document at the end."""
        raw = text.encode()
        chance = math.nan if log_probability is None else log_probability
        self._file.write(_RECORD.pack(len(raw), chance) + raw)
        self.documents += 1
        self.bytes += len(raw)

    def __iter__(self) -> Iterator[Spooled]:
        with self._path.open("rb") as file:
            while record := file.read(_RECORD.size):
                size, chance = _RECORD.unpack(record)
                yield Spooled(file.read(size).decode(), size, None if math.isnan(chance) else chance)

    def sample(self, limit: int) -> Iterator[str]:
        """Yield the texts of documents spread evenly over the spool, about `limit` bytes in all."""
        share = min(1.0, limit / max(1, self.bytes))
        for number, document in enumerate(self):
            if math.floor(number * share) > math.floor((number - 1) * share):
                yield document.text

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink()
