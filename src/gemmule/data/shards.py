"""Token shards: the binary file format of token ids, with header and document index (docs/formats.md)."""

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
# Version 2 has a loss mask, version 1 has none: all of its tokens are trained on.
VERSIONS = PLAIN, MASKED = 1, 2
_LAYOUT = struct.Struct("<8sIIQQQ32s32s24x")  # 128 bytes; read and written by ShardHeader alone
_BLOCK = 1 << 20  # a multiple of both widths of a token

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class ShardHeader(NamedTuple):
    """The first 128 bytes of a shard."""

    magic: bytes
    version: int
    token_width: int  # bytes per token: 2, or 4 where the vocabulary has more than 65,536 ids
    tokens: int
    documents: int
    text_bytes: int
    fingerprint: bytes  # of the tokenizer
    checksum: bytes  # SHA-256 of everything after the header

    @property
    def index_start(self) -> int:
        """The byte offset of the document index: after the tokens, aligned to 8."""
        return _LAYOUT.size + -(-self.tokens * self.token_width // 8) * 8

    @property
    def mask_start(self) -> int:
        """The byte offset of the loss mask: after the document index."""
        return self.index_start + 16 * self.documents

    @property
    def file_size(self) -> int:
        """The size of the whole file in bytes."""
        return self.mask_start + (-(-self.tokens // 8) if self.version == MASKED else 0)


class Shard(NamedTuple):
    """An open shard; its arrays are memory-mapped."""

    path: Path
    header: ShardHeader
    tokens: Tokens
    ends: npt.NDArray[np.int64]  # end of each document, in tokens
    text_bytes: npt.NDArray[np.int64]  # UTF-8 bytes of each document's tokens after its first
    mask: npt.NDArray[np.uint8] | None = None  # loss mask, one bit a token, the first is the highest; None: all of them

    def read_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return whether tokens start to stop are trained on."""
        if self.mask is None:
            return np.ones(stop - start, dtype=np.bool_)
        first = start // 8
        bits = np.unpackbits(self.mask[first : -(-stop // 8)])
        return bits[start - 8 * first : stop - 8 * first].view(np.bool_)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Where each document starts, in tokens."""
        return np.append(0, self.ends[:-1])

    def reply_ends(self) -> npt.NDArray[np.int64]:
        """Return the place of the last token of each reply, a run of tokens that are trained on."""
        mask = self.read_mask(0, self.header.tokens)
        return np.flatnonzero(mask & ~np.append(mask[1:], False))


class ShardWriter:
    """Writes one shard, the header last, so that an unfinished file is not a valid shard.

    Memory: 16 bytes per document, and with a loss mask a byte per token.
    """

    def __init__(self, path: Path, fingerprint: str, vocab_size: int, masked: bool = False) -> None:
        self._fingerprint = bytes.fromhex(fingerprint)
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._checksum = hashlib.sha256()
        self._ends = array("q")
        self._text_bytes = array("q")
        self._mask = bytearray() if masked else None
        self.tokens = 0
        self._file = path.open("wb")
        self._file.seek(_LAYOUT.size)

    @property
    def size(self) -> int:
        """The size of the tokens written so far in bytes."""
        return self.tokens * self._dtype.itemsize

    def append(self, ids: Sequence[int], text_bytes: int, trained: Sequence[bool] | None = None) -> None:
        """Append one document: its tokens, the UTF-8 bytes of those after the first, and in masked shards its mask."""
        if self._mask is not None:
            self._mask += bytes(trained if trained is not None else [True] * len(ids))
        self.tokens += len(ids)
        self._ends.append(self.tokens)
        self._text_bytes.append(text_bytes)
        self._write(np.asarray(ids, dtype=self._dtype).tobytes())

    def finalize(self) -> None:
        """Write the index and the header, and close the file."""
        with self._file:
            self._write(bytes(-self.size % 8))
            for column in (self._ends, self._text_bytes):
                self._write(np.asarray(column, dtype="<i8").tobytes())
            if self._mask is not None:
                self._write(np.packbits(np.frombuffer(self._mask, np.uint8)).tobytes())
            header = ShardHeader(
                MAGIC,
                PLAIN if self._mask is None else MASKED,
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
        """Close the file without a header, so that it is not a valid shard."""
        self._file.close()

    def _write(self, payload: bytes) -> None:
        self._checksum.update(payload)
        self._file.write(payload)


def open_shard(path: Path, fingerprint: str) -> Shard:
    """Memory-map a shard; raises DatasetError where it is damaged or of another tokenizer."""
    header = _read_header(path)
    if header.fingerprint.hex() != fingerprint:
        raise DatasetError(
            f"shard {path}: made with another tokenizer (fingerprint {header.fingerprint.hex()[:12]}, "
            f"this one is {fingerprint[:12]}); prepare the data again with this tokenizer"
        )
    tokens = np.memmap(path, f"<u{header.token_width}", "r", _LAYOUT.size, header.tokens)
    index = np.memmap(path, "<i8", "r", header.index_start, (2, header.documents))
    if int(index[0, -1]) != header.tokens or (np.diff(index[0], prepend=0) < 1).any():
        raise DatasetError(f"shard {path}: damaged (its documents do not fill it); prepare the data again")
    masked = header.version == MASKED
    mask = np.memmap(path, "u1", "r", header.mask_start, -(-header.tokens // 8)) if masked else None
    return Shard(path, header, tokens, index[0], index[1], mask)


def verify_shard(shard: Shard, vocab_size: int) -> None:
    """Check the checksum and all token ids of a shard; raises DatasetError on a mismatch."""
    header, checksum, largest = shard.header, hashlib.sha256(), -1
    left = header.tokens * header.token_width
    try:
        with shard.path.open("rb") as file:
            file.seek(_LAYOUT.size)
            while block := file.read(_BLOCK):
                checksum.update(block)
                if left:
                    ids = np.frombuffer(block, f"<u{header.token_width}", min(left, len(block)) // header.token_width)
                    largest, left = max(largest, int(ids.max())), left - ids.nbytes
    except OSError as error:
        raise DatasetError(f"shard {shard.path}: cannot be read: {error.strerror}") from error
    if checksum.digest() != header.checksum:
        raise DatasetError(f"shard {shard.path}: damaged (its checksum differs); prepare the data again")
    if largest >= vocab_size:
        raise DatasetError(
            f"shard {shard.path}: holds token {largest}, where the tokenizer has {vocab_size} ids; "
            "prepare the data again"
        )


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
    if header.version not in VERSIONS:
        raise DatasetError(
            f"shard {path}: of version {header.version}, this Gemmule reads {' and '.join(map(str, VERSIONS))}; "
            "prepare the data again"
        )
    if header.token_width not in (2, 4) or not header.documents:
        raise DatasetError(f"shard {path}: damaged (its header makes no sense); prepare the data again")
    if size != header.file_size:
        state = "truncated" if size < header.file_size else "damaged"
        raise DatasetError(
            f"shard {path}: {state}: {size} bytes, expected {header.file_size}; prepare the data again or copy it again"
        )
    return header
