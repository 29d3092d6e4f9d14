"""Sampling by `sample.c`, for logits in the CPU's memory; its reference is `gemmule/inference/sampling.py`.

The token of a row is the same alone and among others, and on every machine: the C file fixes the order of its sums.
"""

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from gemmule.inference.native.library import load_library
from gemmule.inference.sampling import (
    REFERENCE,
    LogProbabilities,
    Query,
    Row,
    Sampler,
    SamplingSettings,
    check_words,
)

SOURCE = Path(__file__).with_name("sample.c")
# The structures of sample.c.
SETTINGS, ROW, QUERY = Struct("@6dqPPq"), Struct("@PdPPqPqP"), Struct("@qqq")
_BAD_TOKEN = -3  # what is drawn for a row that names a token beyond the vocabulary, as in sample.c
_EMPTY = array("i").buffer_info()


def make_sampler(device: torch.device) -> Sampler:
    """Return the functions of sampling for logits on a device: in C where that is possible."""
    if device.type != "cpu" or unavailable_reason():
        return REFERENCE
    native = NativeSampler()
    return Sampler(native.draw_rows, native.log_probabilities)


def unavailable_reason() -> str | None:
    """Return why sampling in C is not available, or None; the first call compiles sample.c (1 s)."""
    library = load_library(SOURCE)
    return library if isinstance(library, str) else None


class _Packed(NamedTuple):
    """The structure of a row's settings, and the memory that it points to."""

    address: int
    memory: tuple[object, ...]


class NativeSampler:
    """Draws rows and computes log-probabilities in C, in memory that it keeps; for one thread at a time."""

    def __init__(self) -> None:
        """Load the library; see `unavailable_reason`."""
        library = load_library(SOURCE)
        assert not isinstance(library, str), library
        logits = (c_void_p, c_int64, c_int64)
        workspace = (c_void_p, c_int64)
        library.draw_rows.argtypes = [*logits, c_void_p, c_int64, c_void_p, *workspace]
        library.draw_rows.restype = None
        results = (c_void_p, c_void_p, c_void_p, c_void_p)
        library.log_probabilities.argtypes = [*logits, c_int64, c_void_p, c_int64, c_int64, *results, *workspace]
        library.log_probabilities.restype = None
        library.workspace_bytes.argtypes = [c_int64, c_int64]
        library.workspace_bytes.restype = c_int64
        self._library = library
        self._workspace = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._rows = ctypes.create_string_buffer(0)

    def draw_rows(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Draw a token of each row of logits (B,V), as ids (B,); as `sampling.draw_rows`.

        ValueError for logits that are not float32 in the CPU's memory, each row contiguous.
        """
        if len(rows) != len(logits):
            raise ValueError(f"{len(rows)} rows to draw from logits of {len(logits)}")
        place = self._place(logits)
        if len(self._rows) < ROW.size * len(rows):
            self._rows = ctypes.create_string_buffer(ROW.size * 2 * len(rows))
        held = [self._pack(at * ROW.size, row, logits.shape[-1]) for at, row in enumerate(rows)]
        drawn = torch.empty(len(rows), dtype=torch.long, device="cpu")
        self._library.draw_rows(*place, self._rows, len(rows), drawn.data_ptr(), *self._memory(logits))
        del held  # until here C had pointers to it
        if (drawn == _BAD_TOKEN).any():
            raise IndexError(
                f"a bias, a penalty or an exclusion names a token beyond the vocabulary, {logits.shape[-1]}"
            )
        return drawn

    def log_probabilities(self, logits: Tensor, queries: Sequence[Query]) -> list[LogProbabilities]:
        """Return log-probabilities from rows of logits (B,V); as `sampling.log_probabilities`."""
        if not queries:
            return []
        place = self._place(logits)
        asked = b"".join(QUERY.pack(*query) for query in queries)
        count, most = len(queries), max(0, *(min(query.top_n, logits.shape[-1]) for query in queries))
        tokens = (ctypes.c_double * count)()
        ids, values = (ctypes.c_int32 * (count * most))(), (ctypes.c_double * (count * most))()
        found = (c_int64 * count)()
        self._library.log_probabilities(
            *place, len(logits), asked, count, most, tokens, ids, values, found, *self._memory(logits)
        )
        if _BAD_TOKEN in found[:]:
            bad = queries[found[:].index(_BAD_TOKEN)]
            raise IndexError(f"{bad}: the logits are {tuple(logits.shape)}")
        likeliest = [slice(at * most, at * most + size) for at, size in enumerate(found[:])]
        return [
            LogProbabilities(token, tuple(zip(ids[part], values[part], strict=True)))
            for token, part in zip(tokens, likeliest, strict=True)
        ]

    def _place(self, logits: Tensor) -> tuple[int, int, int]:
        """Return where logits are: address, stride of rows, vocabulary size."""
        if (
            logits.dtype != torch.float32
            or logits.device.type != "cpu"
            or logits.dim() != 2
            or logits.shape[-1] < 1
            or logits.stride(1) != 1
        ):
            described = f"{logits.dtype} {tuple(logits.shape)} on {logits.device}, strides {logits.stride()}"
            raise ValueError(f"logits are {described}: must be float32 (B,V) in the CPU's memory, each row contiguous")
        return logits.data_ptr(), logits.stride(0), logits.shape[1]

    def _memory(self, logits: Tensor) -> tuple[int, int]:
        """Return the workspace's address, and for how many threads it is."""
        threads = min(torch.get_num_threads(), max(1, len(logits)))
        size = self._library.workspace_bytes(logits.shape[-1], threads)
        if len(self._workspace) < size:
            self._workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._workspace.data_ptr(), threads

    def _pack(self, offset: int, row: Row, vocabulary: int) -> "array[int] | None":
        """Write a row's structure; return memory that it points to and the row does not keep."""
        packed = row.packed or _pack_settings(row)
        excluded, allowed, history = None, 0, row.history
        if row.excluded:
            excluded = array("i", row.excluded)
        if row.allowed is not None:
            check_words(row.allowed, vocabulary)
            allowed = row.allowed.data_ptr()
        tokens, count = history.tokens.buffer_info() if history else _EMPTY
        counts, _ = history.counts.buffer_info() if history else _EMPTY
        ROW.pack_into(
            self._rows,
            offset,
            packed.address,
            row.uniform,
            tokens,
            counts,
            count,
            *(excluded.buffer_info() if excluded else _EMPTY),
            allowed,
        )
        return excluded


def _pack_settings(row: Row) -> _Packed:
    """Make the structure of a row's settings, which the row keeps."""
    settings: SamplingSettings = row.settings
    biased = array("i", [token for token, _ in settings.logit_bias])
    biases = array("d", [bias for _, bias in settings.logit_bias])
    structure = array(
        "b",
        SETTINGS.pack(
            settings.temperature,
            settings.top_p,
            settings.min_p,
            settings.repetition_penalty,
            settings.presence_penalty,
            settings.frequency_penalty,
            min(settings.top_k, 2**62),
            biased.buffer_info()[0],
            biases.buffer_info()[0],
            len(biased),
        ),
    )
    row.packed = _Packed(structure.buffer_info()[0], (structure, biased, biases))
    return row.packed
