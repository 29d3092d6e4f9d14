"""The chosen documents of a unit become token shards."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemmule.data.choose import Fate
from gemmule.data.parts import Part, Text
from gemmule.data.report import LENGTHS
from gemmule.data.shards import ShardWriter
from gemmule.data.sources import Unit
from gemmule.data.work import finish, finished
from gemmule.tokenizer import Tokenizer

_PORTION = 1 << 20  # bytes of text that are encoded together


class Assignment(NamedTuple):
    """A unit to encode, and where its documents' fates begin."""

    unit: Unit
    start: int


def encode_unit(given: Assignment, clean: Path, fates: Path, folder: Path, fingerprint: str) -> dict[str, Any]:
    """Write the shards of a unit below `folder`, unless they are there; return the counts of each by its split."""
    note = folder / f"{given.unit.name}.json"
    known = finished(note)
    return _encode_unit(given, clean, fates, note, fingerprint) if known is None else known


def _encode_unit(given: Assignment, clean: Path, fates: Path, note: Path, fingerprint: str) -> dict[str, Any]:
    part = Part(clean, given.unit.name)
    own = np.load(fates, mmap_mode="r")[given.start : given.start + len(part.sizes())]
    tokenizer = _tokenizer(note.parent / "dataset", fingerprint)
    counts, files = {}, []
    for split, fate in (("train", Fate.TRAIN), ("validation", Fate.VALIDATION)):
        wanted = own == fate
        if wanted.any():
            file = note.parent / "dataset" / f"{split}-{given.unit.number:05d}.tokens"
            counts[split] = _write_shard(file, part.texts(wanted), tokenizer)
            files.append(file)
    finish(note, counts, files)
    return counts


def _write_shard(file: Path, texts: Iterable[Text], tokenizer: Tokenizer) -> dict[str, Any]:
    first_bytes = tokenizer.token_bytes()
    lengths: list[int] = []
    size = 0
    shard = ShardWriter(file, tokenizer.fingerprint, tokenizer.vocab_size)
    try:
        for portion in _portions(texts):
            rows = tokenizer.encode_documents([document.text for document in portion])
            for document, ids in zip(portion, rows, strict=True):
                shard.append(ids, document.size - first_bytes[ids[0]])
                lengths.append(len(ids))
                size += document.size
        shard.finish()
    finally:
        shard.close()
    bins = np.bincount(np.searchsorted(LENGTHS, lengths, side="right") - 1)
    return {
        "name": file.name,
        "documents": len(lengths),
        "bytes": size,
        "tokens": sum(lengths),
        "longest": max(lengths),
        "lengths": bins.tolist(),
    }


def _portions(documents: Iterable[Text]) -> Iterator[list[Text]]:
    portion: list[Text] = []
    size = 0
    for document in documents:
        portion.append(document)
        size += document.size
        if size >= _PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, _fingerprint: str) -> Tokenizer:
    """Open the tokenizer once in each process; a large one takes longer than a unit."""
    return Tokenizer.load(folder)
