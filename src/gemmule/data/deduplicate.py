"""Deduplication and the train/validation split: one label per document, a deterministic function of all of them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gemmule.data.holdout import hold_out
from gemmule.data.intermediate import IntermediateShard
from gemmule.data.labels import Label, Labels
from gemmule.data.minhash import BANDS, ROWS, band_keys
from gemmule.data.settings import DataSettings

_PAIRS = 1 << 16  # pairs of signatures per comparison

Indices = npt.NDArray[np.int64]


def label_documents(
    validation: Sequence[IntermediateShard], train: Sequence[IntermediateShard], settings: DataSettings
) -> Labels:
    """Deduplicate exactly and, if set, by MinHash, hold out validation documents; return the labels, validation first.

    Texts of known probability are not deduplicated within a split; train documents that are also in validation are
    always dropped. Memory: about 40 bytes per document.
    """
    shards = [*validation, *train]
    keys = np.concatenate([shard.keys() for shard in shards])
    known = ~np.isnan(np.concatenate([shard.log_probabilities() for shard in shards]))
    in_validation = np.arange(len(keys)) < sum(len(shard.keys()) for shard in validation)
    labels = np.where(in_validation, Label.VALIDATION, Label.TRAIN).astype(np.uint8)
    first = _first_occurrences(keys)
    leaked = in_validation[first] & ~in_validation
    labels[(first != np.arange(len(keys))) & ~known] = Label.DUPLICATE
    labels[leaked] = Label.LEAKED
    del first, leaked
    if settings.near_duplicates is not None:
        candidates = np.flatnonzero((labels <= Label.VALIDATION) & ~known)
        leader = _cluster(shards, candidates, settings.near_duplicates)
        others = np.flatnonzero(leader != np.arange(len(leader)))
        leaked = in_validation[leader[others]] & ~in_validation[others]
        labels[others] = np.where(leaked, Label.NEAR_LEAKED, Label.NEAR_DUPLICATE)
    if settings.validation is None:
        sizes = np.concatenate([shard.sizes() for shard in shards])
        whole = known | (settings.kind != "text")  # a conversation is never divided
        hold_out(labels, keys, sizes, whole, settings.holdout)
    return labels


def _first_occurrences(keys: npt.NDArray[np.uint64]) -> Indices:
    """Return for each key the index of its first occurrence."""
    order = np.argsort(keys, kind="stable")
    first = np.empty_like(order)
    first[order] = order[_run_starts(keys[order])]
    return first


def _run_starts(ordered: npt.NDArray[np.uint64]) -> Indices:
    """Return for each element of a sorted array the index where its run of equal values starts."""
    begins = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + np.uint64(1)))
    return np.repeat(begins, np.diff(begins, append=len(ordered)))


def _cluster(shards: Sequence[IntermediateShard], candidates: Indices, threshold: float) -> Indices:
    """Return for each document the first of its cluster of near-duplicates (transitively similar); for most, itself.

    Locality-sensitive hashing: documents with an equal band of their signatures are compared, each with the first of
    them and with the one before it.
    """
    signatures = [shard.signatures() for shard in shards]
    offsets = np.cumsum([0, *(each.shape[1] for each in signatures)])
    leader = np.arange(offsets[-1])
    for band in range(BANDS):
        keys = np.concatenate([band_keys(each[band]) for each in signatures])[candidates]
        order = np.argsort(keys, kind="stable")
        starts = _run_starts(keys[order])
        again = np.flatnonzero(starts != np.arange(len(starts)))
        del keys
        for earlier in (starts[again], again - 1):
            _merge_similar(leader, candidates[order[earlier]], candidates[order[again]], signatures, offsets, threshold)
    return leader


def _merge_similar(
    leader: Indices,
    one: Indices,
    other: Indices,
    signatures: Sequence[npt.NDArray[np.uint16]],
    offsets: Indices,
    threshold: float,
) -> None:
    """Merge the clusters of similar pairs (union-find)."""
    for start in range(0, len(one), _PAIRS):
        a, b = one[start : start + _PAIRS], other[start : start + _PAIRS]
        unmerged = leader[a] != leader[b]
        a, b = a[unmerged], b[unmerged]
        equal = _gather(signatures, offsets, a) == _gather(signatures, offsets, b)
        similar = equal.mean(axis=(1, 2)) >= threshold
        for left, right in zip(a[similar].tolist(), b[similar].tolist(), strict=True):
            left, right = _leader_of(leader, left), _leader_of(leader, right)
            leader[max(left, right)] = min(left, right)
    while not np.array_equal(leader, shorter := leader[leader]):
        leader[:] = shorter


def _leader_of(leader: Indices, document: int) -> int:
    while (above := int(leader[document])) != document:
        document = above
    return document


def _gather(
    signatures: Sequence[npt.NDArray[np.uint16]], offsets: Indices, documents: Indices
) -> npt.NDArray[np.uint16]:
    """Gather the signatures (N, BANDS, ROWS) of documents."""
    taken = np.empty((len(documents), BANDS, ROWS), np.uint16)
    owners = np.searchsorted(offsets, documents, side="right") - 1
    for owner in np.unique(owners):
        mask = owners == owner
        taken[mask] = signatures[owner][:, documents[mask] - offsets[owner]].transpose(1, 0, 2)
    return taken
