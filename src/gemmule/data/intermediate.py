"""Intermediate shards: the cleaned documents of each work unit on disk, read by deduplication and tokenization."""

import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gemmule.data.minhash import BANDS, ROWS, signature

# Per document: bytes of UTF-8, 64-bit hash of its words, log-probability or NaN where unknown.
_COLUMNS = np.dtype([("size", "<u4"), ("key", "<u8"), ("log_probability", "<f8")])


class StoredText(NamedTuple):
    """The text of a document and its size."""

    text: str
    size: int  # bytes of UTF-8


class IntermediateWriter:
    """Writes one intermediate shard; use it in a `with` block. Memory: 20 bytes per document, 260 with signatures."""

    def __init__(self, folder: Path, name: str, with_signatures: bool) -> None:
        self._shard = IntermediateShard(folder, name)
        self._text = self._shard.text_file.open("wb")
        self._sizes, self._keys, self._log_probabilities = array("I"), array("Q"), array("d")
        self._signatures: list[npt.NDArray[np.uint16]] | None = [] if with_signatures else None
        self.files = [self._shard.text_file, self._shard.columns_file]
        self.bytes = 0

    @property
    def documents(self) -> int:
        """The number of documents written."""
        return len(self._sizes)

    def append(self, text: str, key: int, log_probability: float | None) -> None:
        """Append a document."""
        raw = text.encode()
        self._text.write(raw)
        self._sizes.append(len(raw))
        self._keys.append(key)
        self._log_probabilities.append(math.nan if log_probability is None else log_probability)
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
        columns["size"], columns["key"], columns["log_probability"] = self._sizes, self._keys, self._log_probabilities
        np.save(self._shard.columns_file, columns)
        if self._signatures is not None:
            together = np.array(self._signatures, np.uint16).reshape(-1, BANDS, ROWS)
            np.save(self._shard.signatures_file, np.ascontiguousarray(together.transpose(1, 0, 2)))
            self.files.append(self._shard.signatures_file)


class IntermediateShard:
    """The cleaned documents of a work unit."""

    def __init__(self, folder: Path, name: str) -> None:
        self.text_file = folder / f"{name}.text"
        self.columns_file = folder / f"{name}.columns.npy"
        self.signatures_file = folder / f"{name}.signatures.npy"

    def keys(self) -> npt.NDArray[np.uint64]:
        """Return the 64-bit hash of each document, for exact deduplication."""
        return np.load(self.columns_file)["key"]

    def log_probabilities(self) -> npt.NDArray[np.float64]:
        """Return the log-probability of each document, NaN where unknown."""
        return np.load(self.columns_file)["log_probability"]

    def sizes(self) -> npt.NDArray[np.uint32]:
        """Return the size of each document in bytes."""
        return np.load(self.columns_file)["size"]

    def signatures(self) -> npt.NDArray[np.uint16]:
        """Return the MinHash signatures (BANDS, N, ROWS), memory-mapped."""
        return np.load(self.signatures_file, mmap_mode="r")

    def texts(self, mask: npt.NDArray[np.bool_]) -> Iterator[StoredText]:
        """Yield the documents selected by a boolean mask, in order."""
        with self.text_file.open("rb") as file:
            for size, selected in zip(self.sizes().tolist(), mask.tolist(), strict=True):
                raw = file.read(size)
                if selected:
                    yield StoredText(raw.decode(), size)
