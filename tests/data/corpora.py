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
) -> Corpus:
    sizes = text_bytes or [len(document) for document in documents]
    with CorpusWriter(folder, "train", FINGERPRINT, vocab_size, largest) as writer:
        for document, size in zip(documents, sizes, strict=True):
            writer.append(document, size)
    return open_corpus(folder, writer.names, FINGERPRINT)
