"""The GGUF container, read: metadata and tensors of a file that nobody vouches for.

Everything is checked against the file's size before memory is taken. Layout: the specification in llama.cpp's
ggml/docs/gguf.md, version 3 (and 2, which is the same but for big-endian files).
"""

import mmap
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemmule.errors import MissingExtra, ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# Number type -> (struct format, numpy dtype); 8 is a string, 9 an array.
_NUMBERS = {
    0: ("B", "u1"), 1: ("b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("?", "?"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_F32, _F16 = 0, 1
_PIECE = 1 << 22  # elements that are dequantised at once


class TensorInfo(NamedTuple):
    """Where a tensor lies; the shape is torch's order, rows first."""

    shape: tuple[int, ...]
    kind: int  # ggml's number of the storage type
    start: int
    size: int  # bytes


class GgufFile:
    """An open GGUF file; use as a context manager.

    Raises ModelError where the file is not GGUF, is cut short, or says what cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with _mapped(path) as data:
            self._read_header(_Cursor(data, self._fail), len(data))
        self._file = path.open("rb")

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; arrays that were read stay."""
        self._file.close()

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor in fp32, dequantised; memory beyond the result is a few of its rows."""
        info = self.tensors[name]
        rows = prod(info.shape[:-1])
        result = np.empty((rows, info.shape[-1]), dtype=np.float32)
        stride = info.size // rows
        step = max(1, _PIECE // info.shape[-1])
        dequantize = _dequantizer(info.kind)
        self._file.seek(info.start)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            raw = np.fromfile(self._file, dtype=np.uint8, count=(last - first) * stride)
            result[first:last] = dequantize(raw.reshape(last - first, stride))
        return result.reshape(info.shape)

    def _read_header(self, cursor: "_Cursor", end: int) -> None:
        if cursor.take(4) != _MAGIC:
            self._fail("not a GGUF file")
        version = cursor.number(4)
        if version not in _VERSIONS:
            self._fail(f"GGUF version {version}; Gemmule reads {' and '.join(map(str, _VERSIONS))}")
        tensors, keys = cursor.number(10), cursor.number(10)
        for _ in range(keys):
            key = cursor.text()
            if key in self.metadata:
                self._fail(f"the key {key} stands there twice")
            self.metadata[key] = cursor.value(cursor.number(4))
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            self._fail(f"general.alignment is {alignment!r}, not a multiple of 8")
        places = [self._read_place(cursor) for _ in range(tensors)]
        begin = -(-cursor.place // alignment) * alignment
        taken: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in places:
            if name in self.tensors:
                self._fail(f"the tensor {name} stands there twice")
            size = self._size(name, shape, kind)
            start = begin + offset
            if offset % alignment or start + size > end:
                self._fail(f"the tensor {name} lies beyond the end of the file: it is cut short or damaged")
            self.tensors[name] = TensorInfo(shape, kind, start, size)
            taken.append((start, start + size, name))
        taken.sort()
        for (_, stop, one), (start, _, other) in pairwise(taken):
            if start < stop:
                self._fail(f"the tensors {one} and {other} overlap")

    def _read_place(self, cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = cursor.text(), cursor.number(4)
        if not 1 <= dimensions <= 4:
            self._fail(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(cursor.number(10) for _ in range(dimensions))[::-1]
        return name, shape, cursor.number(4), cursor.number(10)

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        elements, bytes_ = _block(kind) or self._fail(f"the tensor {name} is stored as type {kind}, which is not known")
        if not all(shape) or shape[-1] % elements:
            self._fail(f"the tensor {name} of shape {list(shape)} cannot be stored in blocks of {elements}")
        return prod(shape) // elements * bytes_

    def _fail(self, what: str) -> Any:
        raise ModelError(f"{self.path}: {what}")


class _Cursor:
    """Reads the header from front to back."""

    def __init__(self, data: mmap.mmap, fail: Callable[[str], Any]) -> None:
        self._data, self._fail, self.place = data, fail, 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.place:
            self._fail("the header goes beyond the end of the file: it is cut short or damaged")
        self.place += size
        return self._data[self.place - size : self.place]

    def number(self, kind: int) -> Any:
        form = _NUMBERS[kind][0]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        raw = self.take(self.number(10))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return self._fail("a text in the header is not UTF-8: the file is damaged")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number(4), self.number(10))
        if kind not in _NUMBERS:
            self._fail(f"a value of the header has type {kind}, which is not known")
        return self.number(kind)

    def _array(self, kind: int, count: int) -> Any:
        if kind == _STRING:
            if count > (len(self._data) - self.place) // 8:  # each has a length of eight bytes
                self._fail("an array of the header goes beyond the end of the file: it is cut short or damaged")
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            self._fail(f"an array of the header has elements of type {kind}, which is not read")
        dtype = np.dtype(_NUMBERS[kind][1])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype).tolist()


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except ValueError:
        raise ModelError(f"{path}: the file is empty") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _block(kind: int) -> tuple[int, int] | None:
    """Return (elements, bytes) of a block of a storage type, or None where there is none."""
    gguf = library()
    try:
        sizes: tuple[int, int] = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        return None
    return sizes if kind in (_F32, _F16) or (sizes != (1, 1) and _readable(kind)) else None


def _readable(kind: int) -> bool:
    return library().GGMLQuantizationType(kind) in library().quants._type_traits


def _dequantizer(kind: int) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    if kind in (_F32, _F16):
        return lambda raw: raw.view("<f4" if kind == _F32 else "<f2").astype(np.float32)
    gguf = library()
    return lambda raw: gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))


def library() -> Any:
    """Return the gguf library, or raise MissingExtra."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "gguf", "a .gguf file") from None
    return gguf


def names_of(kinds: Iterator[int]) -> list[str]:
    """Return how ggml calls storage types."""
    return sorted({library().GGMLQuantizationType(kind).name for kind in kinds})
