"""MinHash signatures: the share of equal entries of two signatures estimates the similarity of their texts."""

import numpy as np
import numpy.typing as npt

BANDS, ROWS = 20, 6  # of a signature; texts with an equal band are compared
_HASHES = BANDS * ROWS
_SHINGLE = 16  # characters, a power of two

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64
_EMPTY = np.uint64(2**64 - 1)

Signature = npt.NDArray[np.uint16]  # (BANDS, ROWS)


def signature(text: str) -> Signature:
    """Return the MinHash signature of a text, ignoring white space and case; that of an empty text is all zeros.

    The share of equal numbers in two signatures estimates the Jaccard similarity of the texts' sets of 16 consecutive
    characters. One permutation hashing (Li, Owen and Zhang 2012) with rotation (Shrivastava and Li 2014): each shingle
    is hashed once and falls into one of 120 bins, a bin keeps its least hash, an empty one borrows from the next.
    """
    characters = np.frombuffer("".join(text.casefold().split()).encode("utf-32-le"), np.uint32).astype(np.uint64)
    if not len(characters):
        return np.zeros((BANDS, ROWS), np.uint16)
    hashes = _mix(np.pad(characters, (0, max(0, _SHINGLE - len(characters)))))
    width, factor = 1, _FACTOR
    with np.errstate(over="ignore"):
        while width < _SHINGLE:  # of twice as many characters each time
            hashes = hashes[:-width] * factor + hashes[width:]
            width, factor = 2 * width, factor * factor
        hashes = _mix(hashes)
    bins = (hashes >> np.uint64(32)) * np.uint64(_HASHES) >> np.uint64(32)
    least = np.full(_HASHES, _EMPTY)
    np.minimum.at(least, bins.astype(np.intp), hashes & np.uint64(0xFFFFFFFF))
    full = np.flatnonzero(least != _EMPTY)
    every = np.arange(_HASHES)
    nearest = full[np.searchsorted(full, every) % len(full)]
    distance = ((nearest - every) % _HASHES).astype(np.uint64)
    # Values borrowed over different distances must differ.
    return (_mix(least[nearest] + (distance << np.uint64(32))) >> np.uint64(48)).astype(np.uint16).reshape(BANDS, ROWS)


def band_keys(band: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint64]:
    """Return the hash of each row of a band (N, ROWS)."""
    keys = np.zeros(len(band), np.uint64)
    with np.errstate(over="ignore"):
        for column in range(ROWS):
            keys = _mix(keys * _FACTOR + band[:, column])
    return keys


def _mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
        numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX_2
    return numbers ^ (numbers >> np.uint64(31))
