"""Which of the clean documents are learned, and which are validated on: decided over all of them, in order."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from gemmule.data.parts import Part
from gemmule.data.settings import DataSettings
from gemmule.data.similarity import BANDS, ROWS, band_keys

_AT_ONCE = 1 << 16  # pairs that are compared together

Numbers = npt.NDArray[np.int64]
Fates = npt.NDArray[np.uint8]


class Fate(IntEnum):
    """What becomes of a document."""

    TRAIN = 0
    VALIDATION = 1
    DUPLICATE = 2  # the words are those of an earlier document
    SHARED = 3  # of train; the words are those of a validation document
    NEAR_DUPLICATE = 4
    NEAR_SHARED = 5


def choose_documents(validation: Sequence[Part], train: Sequence[Part], settings: DataSettings) -> Fates:
    """Return the fate of each document, those of validation first.

    Texts of known probability are kept as often as they come, unless train has what is in validation. Memory holds some
    40 bytes a document.
    """
    parts = [*validation, *train]
    keys = np.concatenate([part.keys() for part in parts])
    known = ~np.isnan(np.concatenate([part.log_probabilities() for part in parts]))
    in_validation = np.arange(len(keys)) < sum(len(part.keys()) for part in validation)
    fates = np.where(in_validation, Fate.VALIDATION, Fate.TRAIN).astype(np.uint8)
    first = _first_of_each(keys)
    shared = in_validation[first] & ~in_validation
    fates[(first != np.arange(len(keys))) & ~known] = Fate.DUPLICATE
    fates[shared] = Fate.SHARED
    del first, shared
    if settings.near_duplicates is not None:
        compared = np.flatnonzero((fates <= Fate.VALIDATION) & ~known)
        leader = _first_alike(parts, compared, settings.near_duplicates)
        others = np.flatnonzero(leader != np.arange(len(leader)))
        leaked = in_validation[leader[others]] & ~in_validation[others]
        fates[others] = np.where(leaked, Fate.NEAR_SHARED, Fate.NEAR_DUPLICATE)
    if settings.validation is None:
        below = keys < np.uint64(settings.holdout * 2.0**64)
        fates[below & (fates == Fate.TRAIN)] = Fate.VALIDATION
    return fates


def _first_of_each(keys: npt.NDArray[np.uint64]) -> Numbers:
    """Return for each key where it comes first."""
    order = np.argsort(keys, kind="stable")
    first = np.empty_like(order)
    first[order] = order[_run_starts(keys[order])]
    return first


def _run_starts(ordered: npt.NDArray[np.uint64]) -> Numbers:
    """Return for each of ordered numbers where the run of its equals begins."""
    begins = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + np.uint64(1)))
    return np.repeat(begins, np.diff(begins, append=len(ordered)))


def _first_alike(parts: Sequence[Part], compared: Numbers, threshold: float) -> Numbers:
    """Return for each document the first of those it is alike to, directly or by way of others; for most, itself.

    Documents are compared where a band of their signatures agrees: each with the first such one and the one before it.
    """
    signatures = [part.signatures() for part in parts]
    offsets = np.cumsum([0, *(each.shape[1] for each in signatures)])
    leader = np.arange(offsets[-1])
    for band in range(BANDS):
        keys = np.concatenate([band_keys(each[band]) for each in signatures])[compared]
        order = np.argsort(keys, kind="stable")
        starts = _run_starts(keys[order])
        again = np.flatnonzero(starts != np.arange(len(starts)))
        del keys
        for earlier in (starts[again], again - 1):
            _join_alike(leader, compared[order[earlier]], compared[order[again]], signatures, offsets, threshold)
    return leader


def _join_alike(
    leader: Numbers,
    one: Numbers,
    other: Numbers,
    signatures: Sequence[npt.NDArray[np.uint16]],
    offsets: Numbers,
    threshold: float,
) -> None:
    """Give the pairs that are alike the same leader."""
    for start in range(0, len(one), _AT_ONCE):
        a, b = one[start : start + _AT_ONCE], other[start : start + _AT_ONCE]
        apart = leader[a] != leader[b]
        a, b = a[apart], b[apart]
        equal = _take(signatures, offsets, a) == _take(signatures, offsets, b)
        alike = equal.mean(axis=(1, 2)) >= threshold
        for left, right in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
            left, right = _leader_of(leader, left), _leader_of(leader, right)
            leader[max(left, right)] = min(left, right)
    while not np.array_equal(leader, shorter := leader[leader]):
        leader[:] = shorter


def _leader_of(leader: Numbers, document: int) -> int:
    while (above := int(leader[document])) != document:
        document = above
    return document


def _take(signatures: Sequence[npt.NDArray[np.uint16]], offsets: Numbers, documents: Numbers) -> npt.NDArray[np.uint16]:
    """Return the signatures (N, BANDS, ROWS) of some documents."""
    taken = np.empty((len(documents), BANDS, ROWS), np.uint16)
    owners = np.searchsorted(offsets, documents, side="right") - 1
    for owner in np.unique(owners):
        here = owners == owner
        taken[here] = signatures[owner][:, documents[here] - offsets[owner]].transpose(1, 0, 2)
    return taken
