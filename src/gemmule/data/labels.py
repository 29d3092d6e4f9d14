"""The label of each document: the split it belongs to, or why it is dropped."""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from gemmule.data.intermediate import IntermediateShard, StoredText

Labels = npt.NDArray[np.uint8]


class Label(IntEnum):
    """The split of a document, or the reason to drop it."""

    TRAIN = 0
    VALIDATION = 1
    DUPLICATE = 2  # of an earlier document
    LEAKED = 3  # a train document that duplicates a validation document
    NEAR_DUPLICATE = 4
    NEAR_LEAKED = 5
    DIVIDED = 6  # its end belongs to validation, the rest to train


# The counters of the report for the documents that deduplication drops.
DROPPED = {
    Label.DUPLICATE: "duplicate",
    Label.LEAKED: "shared",
    Label.NEAR_DUPLICATE: "near_duplicate",
    Label.NEAR_LEAKED: "near_shared",
}


def in_split(labels: Labels, split: str) -> npt.NDArray[np.bool_]:
    """Return the mask of the documents that belong to a split, whole or in part."""
    return (labels == (Label.TRAIN if split == "train" else Label.VALIDATION)) | (labels == Label.DIVIDED)


def split_texts(
    shard: IntermediateShard, labels: Labels, split: str, share: float, mask: npt.NDArray[np.bool_] | None = None
) -> Iterator[StoredText]:
    """Yield the texts of a split in a shard, or those selected by a mask, in order."""
    mask = in_split(labels, split) if mask is None else mask
    for text, label in zip(shard.texts(mask), labels[mask].tolist(), strict=True):
        if label == Label.DIVIDED:
            own = divide_document(text.text, share)[split == "validation"]
            yield StoredText(own, len(own.encode()))
        else:
            yield text


def divide_document(text: str, share: float) -> tuple[str, str]:
    """Split a document in two, the second part at least `share` of it and at most twice that.

    The split is after a paragraph, else after a line, else after a word, else anywhere.
    """
    size = max(1, int(share * len(text)))
    earliest, latest = max(1, len(text) - 2 * size), len(text) - size
    found = (text.rfind(mark, earliest, latest) for mark in ("\n\n", "\n", " "))
    index = next((index for index in found if index >= 0), latest)
    return text[:index].rstrip(), text[index:].lstrip()
