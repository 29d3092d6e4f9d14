"""The validation split held out of the train documents, where no validation source is set."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gemmule.data.intermediate import IntermediateShard
from gemmule.data.labels import Label, Labels, in_split

_MIN_END = 64  # bytes: the shortest end of a document that is held out
_MAX_RATIO = 10  # of the share held out to the share asked for


def hold_out(
    labels: Labels,
    keys: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.uint32],
    known: npt.NDArray[np.bool_],
    share: float,
) -> None:
    """Hold out whole documents, by the hash of their text; if too few, the ends of long ones, or else one document.

    Deterministic. Where none of this comes near the share, nothing or everything is held out.
    """
    left = labels == Label.TRAIN
    held = left & (keys < np.uint64(share * 2.0**64))
    first = left & (keys == keys[left].min(initial=np.uint64(2**64 - 1)))
    long = left & ~known & (share * sizes >= _MIN_END)

    def fits(chosen: npt.NDArray[np.bool_]) -> bool:
        size = sizes[chosen].sum(dtype=np.int64) / max(1, sizes[left].sum(dtype=np.int64))
        return bool(0 < chosen.sum() < left.sum() and size <= min(_MAX_RATIO * share, (1 + share) / 2))

    if not fits(held) and long.any():
        labels[long] = Label.DIVIDED
    else:
        labels[held if held.any() or not fits(first) else first] = Label.VALIDATION


def working_share(
    train: Sequence[IntermediateShard], labels: Labels, share: float, divide: bool = True
) -> float | None:
    """Return the share nearest to `share` that gives two non-empty splits; None where there is none.

    `labels` are those of the train documents at `share`, where one split is empty. `divide` is whether the end of a
    document may be held out.
    """
    keys = np.concatenate([shard.keys() for shard in train])
    sizes = np.concatenate([shard.sizes() for shard in train])
    known = ~np.isnan(np.concatenate([shard.log_probabilities() for shard in train])) | (not divide)
    before = np.where(labels <= Label.VALIDATION, Label.TRAIN, labels).astype(np.uint8)
    usable = before == Label.TRAIN
    thresholds = np.sort(keys[usable]) / 2.0**64
    between = (thresholds[:-1] + thresholds[1:]) / 2  # a share that holds out some whole documents, and not all
    longest = int(sizes[usable & ~known].max(initial=1))
    found = []
    for candidate in [_MIN_END / longest, *between[:8], *between[-8:]]:
        candidate = math.ceil(1000 * candidate) / 1000
        if candidate >= 1:
            continue
        after = before.copy()
        hold_out(after, keys, sizes, known, candidate)
        if in_split(after, "train").any() and in_split(after, "validation").any():
            found.append(candidate)
    return min(found, key=lambda each: abs(each - share), default=None)
