"""Token shards: one file of tokens with a header that says what they are; docs/formats.md describes it byte by byte."""

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemmule.errors import DatasetError

MAGIC = b"GEMMULE\0"
VERSION = 1
_LAYOUT = struct.Struct("<8sIIQQQ32s32s24x")  # 128 bytes; read and written by ShardHeader alone
_BLOCK = 1 << 20

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class ShardHeader(NamedTuple):
    """What the first 128 bytes of a shard say."""

    magic: bytes
    version: int
    token_width: int  # bytes a token: 2, or 4 where the vocabulary has more than 65,536 ids
    tokens: int
    documents: int
    text_bytes: int
    fingerprint: bytes  # of the tokenizer
    checksum: bytes  # SHA-256 of everything after the header

    @property
    def index_start(self) -> int:
        """The byte where the document index begins: after the tokens, at a multiple of 8."""
        return _LAYOUT.size + -(-self.tokens * self.token_width // 8) * 8

    @property
    def file_size(self) -> int:
        """The bytes of the whole file."""
        return self.index_start + 16 * self.documents


class Shard(NamedTuple):
    """An open shard; the arrays are views of the memory-mapped file."""

    path: Path
    header: ShardHeader
    tokens: Tokens
    ends: npt.NDArray[np.int64]  # where each document ends among the tokens
    text_bytes: npt.NDArray[np.int64]  # UTF-8 bytes that each document's tokens after its first stand for


class ShardWriter:
    """Writes one shard, the header last, so that a file that was not finished is not taken for a shard.

    Memory grows by 16 bytes a document.
    """

    def __init__(self, path: Path, fingerprint: str, vocab_size: int) -> None:
        self._fingerprint = bytes.fromhex(fingerprint)
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._checksum = hashlib.sha256()
        self._ends = array("q")
        self._text_bytes = array("q")
        self.tokens = 0
        self._file = path.open("wb")
        self._file.write(bytes(_LAYOUT.size))

    @property
    def size(self) -> int:
        """The bytes of tokens written so far."""
        return self.tokens * self._dtype.itemsize

    def append(self, ids: Sequence[int], text_bytes: int) -> None:
        """Add one document: its tokens and the bytes of text that those after the first stand for."""
        self.tokens += len(ids)
        self._ends.append(self.tokens)
        self._text_bytes.append(text_bytes)
        self._write(np.asarray(ids, dtype=self._dtype).tobytes())

    def finish(self) -> None:
        """Write the index and the header, and close the file."""
        with self._file:
            self._write(bytes(-self.size % 8))
            for column in (self._ends, self._text_bytes):
                self._write(np.asarray(column, dtype="<i8").tobytes())
            header = ShardHeader(
                MAGIC,
                VERSION,
                self._dtype.itemsize,
                self.tokens,
                len(self._ends),
                sum(self._text_bytes),
                self._fingerprint,
                self._checksum.digest(),
            )
            self._file.seek(0)
            self._file.write(_LAYOUT.pack(*header))

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _write(self, payload: bytes) -> None:
        self._checksum.update(payload)
        self._file.write(payload)


def open_shard(path: Path, fingerprint: str) -> Shard:
    """Memory-map a shard; raises DatasetError where it is damaged or of a tokenizer with another fingerprint."""
    header = _read_header(path)
    if header.fingerprint.hex() != fingerprint:
        raise DatasetError(
            f"shard {path}: made with another tokenizer (fingerprint {header.fingerprint.hex()[:12]}, "
            f"this one is {fingerprint[:12]}); prepare the data again with this tokenizer"
        )
    tokens = np.memmap(path, f"<u{header.token_width}", "r", _LAYOUT.size, header.tokens)
    index = np.memmap(path, "<i8", "r", header.index_start, (2, header.documents))
    return Shard(path, header, tokens, index[0], index[1])


def verify_shard(shard: Shard) -> None:
    """Read the whole file and compare its checksum; raises DatasetError where a byte has changed."""
    checksum = hashlib.sha256()
    with shard.path.open("rb") as file:
        file.seek(_LAYOUT.size)
        while block := file.read(_BLOCK):
            checksum.update(block)
    if checksum.digest() != shard.header.checksum:
        raise DatasetError(f"shard {shard.path}: damaged (its checksum differs); prepare the data again")


def _read_header(path: Path) -> ShardHeader:
    try:
        with path.open("rb") as file:
            raw = file.read(_LAYOUT.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DatasetError(f"shard {path}: cannot be read: {error.strerror}") from error
    if not raw or not raw.startswith(MAGIC[: len(raw)]):
        raise DatasetError(f"shard {path}: not a token shard of Gemmule; prepare the data again")
    if len(raw) < _LAYOUT.size:
        raise DatasetError(f"shard {path}: truncated: {size} bytes, fewer than its header's {_LAYOUT.size}")
    header = ShardHeader(*_LAYOUT.unpack(raw))
    if header.version != VERSION:
        raise DatasetError(
            f"shard {path}: of version {header.version}, this Gemmule reads {VERSION}; prepare the data again"
        )
    if header.token_width not in (2, 4) or not header.documents:
        raise DatasetError(f"shard {path}: damaged (its header makes no sense); prepare the data again")
    if size != header.file_size:
        state = "truncated" if size < header.file_size else "damaged"
        raise DatasetError(
            f"shard {path}: {state}: {size} bytes, expected {header.file_size}; prepare the data again or copy it anew"
        )
    return header
