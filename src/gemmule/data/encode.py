"""Tokenization: the kept documents of a work unit become token shards."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemmule.data.intermediate import IntermediateShard, StoredText
from gemmule.data.labels import in_split, split_texts
from gemmule.data.loss_mask import count_loss_mask
from gemmule.data.rendering import ROWS_SUFFIX, EncodedDocument, encode_rows
from gemmule.data.report import LENGTHS
from gemmule.data.shards import ShardWriter, open_shard
from gemmule.data.sources import WorkUnit
from gemmule.data.stage_cache import commit, committed
from gemmule.tokenizer import Tokenizer

_BATCH = 1 << 20  # bytes of text per batch of tokenization


class EncodingTask(NamedTuple):
    """A work unit to tokenize, and the index of its first document among the labels."""

    unit: WorkUnit
    start: int


def encode_unit(
    task: EncodingTask, clean: Path, labels: Path, share: float, folder: Path, fingerprint: str, kind: str = "text"
) -> dict[str, Any]:
    """Write the token shards of a work unit below `folder`, unless cached; return the counts of each by its split.

    `share` is the part of a divided document that is held out, `kind` that of the rows.
    """
    manifest = folder / f"{task.unit.name}.json"
    cached = committed(manifest)
    return _encode_unit(task, clean, labels, share, manifest, fingerprint, kind) if cached is None else cached


def _encode_unit(
    task: EncodingTask, clean: Path, labels: Path, share: float, manifest: Path, fingerprint: str, kind: str
) -> dict[str, Any]:
    stored = IntermediateShard(clean, task.unit.name)
    own = np.load(labels, mmap_mode="r")[task.start : task.start + len(stored.sizes())]
    tokenizer = _tokenizer(manifest.parent / "dataset", fingerprint)
    counts, files = {}, []
    for split in ("train", "validation"):
        if in_split(own, split).any():
            file = manifest.parent / "dataset" / f"{split}-{task.unit.number:05d}.tokens"
            texts = split_texts(stored, own, split, share)
            if kind == "text":
                counts[split] = _write_shard(file, encode_texts(texts, tokenizer), tokenizer, masked=False)
            else:
                counts[split] = _write_rows(file, list(texts), tokenizer, kind)
            files += [file, *([file.with_suffix(ROWS_SUFFIX)] if kind == "prompts" else [])]
    commit(manifest, counts, files)
    return counts


def _write_rows(file: Path, rows: Sequence[StoredText], tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
    """Write the shard of rows, and beside one of prompts the rows themselves."""
    spellings = 0

    def encoded() -> Iterator[EncodedDocument]:
        nonlocal spellings
        for document in encode_rows(rows, tokenizer, kind):
            spellings += document.special_spellings
            yield document

    counts = _write_shard(file, encoded(), tokenizer, masked=True)
    counts["documents"] = len(rows)
    if kind != "prompts":
        shard = open_shard(file, tokenizer.fingerprint)
        counts["loss_mask"] = count_loss_mask(shard, tokenizer, spellings).model_dump()
    else:
        text = "".join(f"{row.text}\n" for row in rows)
        file.with_suffix(ROWS_SUFFIX).write_text(text, encoding="utf-8", newline="")
    return counts


def _write_shard(
    file: Path, documents: Iterable["EncodedText | EncodedDocument"], tokenizer: Tokenizer, masked: bool
) -> dict[str, Any]:
    lengths: list[int] = []
    size = changed = 0
    shard = ShardWriter(file, tokenizer.fingerprint, tokenizer.vocab_size, masked)
    try:
        for document in documents:
            trained = document.trained if isinstance(document, EncodedDocument) else None
            shard.append(document.ids, document.predicted_bytes, trained)
            lengths.append(len(document.ids))
            size += document.size
            changed += not document.restored
        shard.finalize()
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
        "changed": changed,
    }


class EncodedText(NamedTuple):
    """A tokenized document."""

    ids: list[int]
    size: int  # bytes of UTF-8
    predicted_bytes: int  # of the tokens after the first, which is not predicted
    restored: bool  # whether decoding gives the same text


def encode_texts(texts: Iterable[StoredText], tokenizer: Tokenizer) -> Iterator[EncodedText]:
    """Yield the tokens of each document, tokenized in batches of about 1 MiB of text."""
    first_bytes = tokenizer.token_bytes()
    for batch in _batches(texts):
        given = [document.text for document in batch]
        rows = tokenizer.encode_documents(given)
        for document, ids, restored in zip(batch, rows, tokenizer.restores(given, rows), strict=True):
            yield EncodedText(ids, document.size, document.size - first_bytes[ids[0]], restored)


def _batches(documents: Iterable[StoredText]) -> Iterator[list[StoredText]]:
    batch: list[StoredText] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, _fingerprint: str) -> Tokenizer:
    """Open the tokenizer once per process: a large one takes longer to open than a work unit to tokenize."""
    return Tokenizer.load(folder)
