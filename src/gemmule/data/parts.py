"""Clean documents on disk, a part for each unit: between the stage that cleans and those that choose and encode."""

import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gemmule.data.similarity import BANDS, ROWS, signature

# Of each document: bytes of UTF-8, 64 bits of its words' hash, log-probability or NaN where it is not known.
_COLUMNS = np.dtype([("size", "<u4"), ("key", "<u8"), ("log_probability", "<f8")])


class Text(NamedTuple):
    """A document as it comes back."""

    text: str
    size: int  # bytes of UTF-8


class PartWriter:
    """Writes one part; use it in a `with` block. Memory grows by 20 bytes a document, by 260 with signatures."""

    def __init__(self, folder: Path, name: str, with_signatures: bool) -> None:
        self._part = Part(folder, name)
        self._text = self._part.text_file.open("wb")
        self._sizes, self._keys, self._chances = array("I"), array("Q"), array("d")
        self._signatures: list[npt.NDArray[np.uint16]] | None = [] if with_signatures else None
        self.files = [self._part.text_file, self._part.columns_file]
        self.bytes = 0

    @property
    def documents(self) -> int:
        """How many were written."""
        return len(self._sizes)

    def append(self, text: str, key: int, log_probability: float | None) -> None:
        """Write a document at the end."""
        raw = text.encode()
        self._text.write(raw)
        self._sizes.append(len(raw))
        self._keys.append(key)
        self._chances.append(math.nan if log_probability is None else log_probability)
        self.bytes += len(raw)
        if self._signatures is not None:
            self._signatures.append(signature(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._text.close()
        if kind is not None:
            return
        columns = np.empty(self.documents, _COLUMNS)
        columns["size"], columns["key"], columns["log_probability"] = self._sizes, self._keys, self._chances
        np.save(self._part.columns_file, columns)
        if self._signatures is not None:
            together = np.array(self._signatures, np.uint16).reshape(-1, BANDS, ROWS)
            np.save(self._part.signatures_file, np.ascontiguousarray(together.transpose(1, 0, 2)))
            self.files.append(self._part.signatures_file)


class Part:
    """The clean documents of a unit."""

    def __init__(self, folder: Path, name: str) -> None:
        self.text_file = folder / f"{name}.text"
        self.columns_file = folder / f"{name}.columns.npy"
        self.signatures_file = folder / f"{name}.signatures.npy"

    def keys(self) -> npt.NDArray[np.uint64]:
        """Return 64 bits of each document that tell texts apart."""
        return np.load(self.columns_file)["key"]

    def log_probabilities(self) -> npt.NDArray[np.float64]:
        """Return the log-probability of each document, NaN where it is not known."""
        return np.load(self.columns_file)["log_probability"]

    def sizes(self) -> npt.NDArray[np.uint32]:
        """Return the bytes of each document."""
        return np.load(self.columns_file)["size"]

    def signatures(self) -> npt.NDArray[np.uint16]:
        """Return the signatures (BANDS, N, ROWS) as a view of the file."""
        return np.load(self.signatures_file, mmap_mode="r")

    def texts(self, wanted: npt.NDArray[np.bool_]) -> Iterator[Text]:
        """Yield the documents that are wanted, in order."""
        with self.text_file.open("rb") as file:
            for size, yes in zip(self.sizes().tolist(), wanted.tolist(), strict=True):
                raw = file.read(size)
                if yes:
                    yield Text(raw.decode(), size)
