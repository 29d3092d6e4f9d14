"""Reader of the GGUF container: metadata and tensors of an untrusted file.

Every size is checked against the file before memory is allocated. Layout: the specification in llama.cpp's
ggml/docs/gguf.md, version 3 (and 2, which is the same but for big-endian files).
"""

import mmap
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemmule.errors import MissingExtra, ModelError
from gemmule.reading import IS_LFS_POINTER, is_lfs_pointer, path_kind

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# Number type -> (struct format, numpy dtype); 8 is a string, 9 an array.
_NUMBERS = {
    0: ("B", "u1"), 1: ("b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("?", "?"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_F32, _F16 = 0, 1
_CHUNK = 1 << 22  # elements that are dequantized at once
# Limit of metadata arrays; Gemma 3's have 262,208 entries at most, one per token.
_LONGEST_ARRAY = 1 << 24
_MOST_PARTS = 99_999


class TensorInfo(NamedTuple):
    """Location of a tensor; the shape is in torch's order."""

    file: Path
    shape: tuple[int, ...]
    kind: int  # ggml's number of the storage type
    start: int
    size: int  # bytes


class GgufFile:
    """An open GGUF model of one file or several parts, given the first; a context manager.

    Raises ModelError for a file that is not GGUF, truncated or inconsistent, and for a missing part.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = GgufHeader(path)
        self.metadata: dict[str, Any] = first.metadata
        self.tensors: dict[str, TensorInfo] = first.tensors
        for number, file in enumerate(_other_parts(first), 2):
            part = GgufHeader(file)
            if part.metadata.get("split.no") != number - 1:
                raise ModelError(f"{file}: is not part {number} of {path}")
            if twins := sorted(self.tensors.keys() & part.tensors.keys()):
                raise ModelError(f"{file}: the tensor {twins[0]!r:.80} is also in another part")
            self.tensors |= part.tensors
        declared = self.metadata.get("split.tensors.count", len(self.tensors))
        if declared != len(self.tensors):
            raise ModelError(f"{path}: split.tensors.count is {declared!r}; its parts have {len(self.tensors)} tensors")
        self._open: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; arrays that were read stay valid."""
        for file in self._open.values():
            file.close()

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor dequantized to fp32, chunk by chunk."""
        info = self.tensors[name]
        rows = prod(info.shape[:-1])
        result = np.empty((rows, info.shape[-1]), dtype=np.float32)
        stride = info.size // rows
        step = max(1, _CHUNK // info.shape[-1])
        dequantize = _dequantizer(info.kind)
        try:
            if info.file not in self._open:
                self._open[info.file] = info.file.open("rb")
            file = self._open[info.file]
            file.seek(info.start)
            for first in range(0, rows, step):
                last = min(rows, first + step)
                raw = file.read((last - first) * stride)
                if len(raw) < (last - first) * stride:
                    raise ModelError(f"{info.file}: was truncated while it was read")
                result[first:last] = dequantize(np.frombuffer(raw, np.uint8).reshape(last - first, stride))
        except OSError as error:
            raise ModelError(f"{info.file}: cannot be read: {error.strerror}") from None
        return result.reshape(info.shape)


class GgufHeader:
    """Header of one GGUF file: `metadata`, and the location of each of its `tensors`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with _mapped(path) as data:
            self._read_header(_Cursor(data, self._fail), len(data))

    def _read_header(self, cursor: "_Cursor", end: int) -> None:
        beginning = cursor.beginning()
        if not beginning.startswith(MAGIC):
            self._fail(IS_LFS_POINTER if is_lfs_pointer(beginning) else "not a GGUF file")
        cursor.take(len(MAGIC))
        version = cursor.number(4)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            written = "a big-endian file" if swapped else f"GGUF version {version}"
            self._fail(f"{written}; Gemmule reads versions {' and '.join(map(str, _VERSIONS))}, little-endian")
        tensors, keys = cursor.number(10), cursor.number(10)
        for _ in range(keys):
            key = cursor.text()
            if key in self.metadata:
                self._fail(f"duplicate key {key!r:.80}")
            self.metadata[key] = cursor.value(cursor.number(4))
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment <= 0:
            self._fail(f"general.alignment is {alignment!r:.80}, not a positive integer")
        declared = [self._read_tensor_info(cursor) for _ in range(tensors)]
        begin = -(-cursor.offset // alignment) * alignment
        for name, shape, kind, offset in declared:
            if name in self.tensors:
                self._fail(f"duplicate tensor {name!r:.80}")
            size = self._size(name, shape, kind)
            start = begin + offset
            if offset % alignment or start + size > end:
                self._fail(f"the tensor {name!r:.80} lies beyond the end of the file, which is truncated or damaged")
            self.tensors[name] = TensorInfo(self.path, shape, kind, start, size)
        taken = sorted((info.start, info.start + info.size, name) for name, info in self.tensors.items())
        for (_, stop, one), (start, _, other) in pairwise(taken):
            if start < stop:
                self._fail(f"the tensors {one!r:.80} and {other!r:.80} overlap")

    def _read_tensor_info(self, cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = cursor.text(), cursor.number(4)
        if not 1 <= dimensions <= 4:
            self._fail(f"the tensor {name!r:.80} has {dimensions} dimensions")
        shape = tuple(cursor.number(10) for _ in range(dimensions))[::-1]
        return name, shape, cursor.number(4), cursor.number(10)

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        elements, bytes_ = _block(kind) or self._fail(f"the tensor {name!r:.80} has the unknown storage type {kind}")
        if not all(shape) or shape[-1] % elements:
            self._fail(f"the tensor {name!r:.80} of shape {list(shape)} cannot be stored in blocks of {elements}")
        return prod(shape) // elements * bytes_

    def _fail(self, what: str) -> Any:
        raise ModelError(f"{self.path}: {what}")


class _Cursor:
    """Reads the header from front to back."""

    def __init__(self, data: mmap.mmap, fail: Callable[[str], Any]) -> None:
        self._data, self._fail, self.offset = data, fail, 0

    def beginning(self) -> bytes:
        """Return the first bytes of the file, enough to identify it."""
        return self._data[:64]

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.offset:
            self._fail("the header goes beyond the end of the file, which is truncated or damaged")
        self.offset += size
        return self._data[self.offset - size : self.offset]

    def number(self, kind: int) -> Any:
        form = _NUMBERS[kind][0]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        raw = self.take(self.number(10))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return self._fail("a string in the header is not UTF-8: the file is damaged")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number(4), self.number(10))
        if kind not in _NUMBERS:
            self._fail(f"a value in the header has the unknown type {kind}")
        return self.number(kind)

    def _array(self, kind: int, count: int) -> Any:
        if count > _LONGEST_ARRAY:
            self._fail(f"an array in the header has {count} elements, more than the limit of {_LONGEST_ARRAY}")
        if kind == _STRING:
            if count > (len(self._data) - self.offset) // 8:  # each has a length of eight bytes
                self._fail("an array in the header goes beyond the end of the file, which is truncated or damaged")
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            self._fail(f"an array in the header has elements of the unsupported type {kind}")
        dtype = np.dtype(_NUMBERS[kind][1])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype).tolist()


def _other_parts(first: GgufHeader) -> list[Path]:
    """Return the further files of a split model."""
    count, number = first.metadata.get("split.count", 0), first.metadata.get("split.no", 0)
    if type(count) is not int or not 0 <= count <= _MOST_PARTS or type(number) is not int:
        raise ModelError(f"{first.path}: split.count is {count!r:.80} and split.no {number!r:.80}")
    if count < 2:
        return []
    if number:
        raise ModelError(f"{first.path}: is part {number + 1} of {count}; name the first one")
    ending = f"-00001-of-{count:05}.gguf"
    if not first.path.name.endswith(ending):
        advice = (
            f"name it NAME{ending}, so that the other parts are found, or merge them with  llama-gguf-split --merge"
        )
        raise ModelError(f"{first.path}: is part 1 of {count}; {advice}")
    stem = first.path.name.removesuffix(ending)
    return [first.path.with_name(f"{stem}-{part:05}-of-{count:05}.gguf") for part in range(2, count + 1)]


def is_gguf(path: Path) -> bool:
    """Whether a file starts with the GGUF magic bytes; ModelError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _mapped(path: Path) -> mmap.mmap:
    if (kind := path_kind(path, ModelError)) in (None, "other"):  # opening a pipe would block
        raise ModelError(f"{path}: {'no such file' if kind is None else 'not a regular file'}")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise ModelError(f"{path}: the file is empty") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _block(kind: int) -> tuple[int, int] | None:
    """Return (elements, bytes) per block of a storage type, or None for an unknown type."""
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


def storage_type_names(kinds: Iterator[int]) -> list[str]:
    """Return ggml's names of storage types."""
    return sorted({library().GGMLQuantizationType(kind).name for kind in kinds})
