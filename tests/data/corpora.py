"""Corpora of known tokens, written to a folder."""

from collections.abc import Sequence
from pathlib import Path

from gemmule.data.corpus import Corpus, CorpusWriter, open_corpus

FINGERPRINT = "ab" * 32


def write_corpus(
    folder: Path,
    documents: Sequence[Sequence[int]],
    text_bytes: Sequence[int] | None = None,
    vocab_size: int = 1000,
    largest: int = 1 << 28,
    masks: Sequence[Sequence[bool]] | None = None,
) -> Corpus:
    sizes = text_bytes or [len(document) for document in documents]
    with CorpusWriter(folder, "train", FINGERPRINT, vocab_size, largest, masked=masks is not None) as writer:
        for number, (document, size) in enumerate(zip(documents, sizes, strict=True)):
            writer.append(document, size, masks[number] if masks else None)
    return open_corpus(folder, writer.names, FINGERPRINT)
