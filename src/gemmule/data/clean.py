"""Cleaning and filtering of documents, one work unit at a time, with counts."""

import json
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.data.conversations import contents_of, row_text, with_contents
from gemmule.data.documents import Document, ReadStats
from gemmule.data.filters import reason_to_drop
from gemmule.data.intermediate import IntermediateWriter
from gemmule.data.settings import DataSettings
from gemmule.data.sources import WorkUnit, read_range
from gemmule.data.stage_cache import commit, committed

# The inverse of cp1252 on the bytes 80 to 9F; the five undefined ones map to themselves.
_CP1252 = {ord(bytes([byte]).decode("cp1252", errors="ignore") or chr(byte)): byte for byte in range(0x80, 0xA0)}


class CleanDocument(NamedTuple):
    """A document that passed cleaning and filters; deduplication comes later."""

    text: str
    key: int  # 64-bit hash for exact deduplication, ignoring white space
    log_probability: float | None


def clean_unit(unit: WorkUnit, settings: DataSettings, folder: Path) -> dict[str, Any]:
    """Write the cleaned documents of a work unit to an intermediate shard, unless cached; return the counts.

    Deterministic: the same unit gives the same bytes in any process.
    """
    manifest = folder / f"{unit.name}.json"
    cached = committed(manifest)
    return _clean_unit(unit, settings, manifest) if cached is None else cached


def _clean_unit(unit: WorkUnit, settings: DataSettings, manifest: Path) -> dict[str, Any]:
    tally: Counter[str] = Counter()
    stats = []
    with IntermediateWriter(manifest.parent, unit.name, with_signatures=settings.near_duplicates is not None) as shard:
        for source_range in unit.ranges:
            stats.append(ReadStats())
            for document in read_range(source_range, settings):
                stats[-1] = stats[-1].add(document)
                if clean := clean_document(document, settings, tally):
                    shard.append(clean.text, clean.key, clean.log_probability)
    result = {"tally": tally, "stats": stats, "documents": shard.documents, "bytes": shard.bytes}
    commit(manifest, result, shard.files)
    return result


def clean_document(document: Document, settings: DataSettings, tally: Counter[str]) -> CleanDocument | None:
    """Return the cleaned document, or None where it is dropped; count the reason in `tally`.

    A text of known probability is not changed.
    """
    tally["read"] += 1
    known = document.log_probability is not None
    is_row = settings.kind != "text"
    text = document.text if known else (_clean_row if is_row else _clean_text)(document.text, tally)
    if not isinstance(text, str):
        tally["not_utf8"] += 1
    elif not text:
        tally["empty"] += 1
    elif not known and (reason := reason_to_drop(_text_of_row(text) if is_row else text, settings)):
        tally[reason] += 1
    else:
        return CleanDocument(text, text_key(text), document.log_probability)
    return None


def text_key(text: str) -> int:
    """Return a 64-bit hash of the text that ignores white space."""
    words = " ".join(text.split())
    return int.from_bytes(blake2b(words.encode(), digest_size=8).digest(), "little")


def repair_mojibake(text: str) -> str:
    """Undo mojibake: UTF-8 that was decoded as cp1252, where all of the text decodes back exactly."""
    if text.isascii():
        return text
    try:
        return text.translate(_CP1252).encode("latin-1").decode()
    except UnicodeError:
        return text


def _clean_text(text: str | bytes, tally: Counter[str]) -> str | None:
    """Return the text repaired and stripped, or None where it is invalid UTF-8."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        text.encode()  # half of a surrogate pair, as JSON can spell it, is no text
    except UnicodeError:
        return None
    repaired = repair_mojibake(text)
    tally["repaired"] += repaired != text
    return repaired.replace("\r\n", "\n").strip()


def _clean_row(text: str | bytes, tally: Counter[str]) -> str | None:
    """Return the canonical JSON of a row with each of its texts repaired and stripped; None as for a text."""
    if isinstance(text, bytes):
        return None
    row, repaired = json.loads(text), Counter[str]()
    contents = [_clean_text(content, repaired) for content in contents_of(row)]
    tally["repaired"] += bool(repaired["repaired"])
    if None in contents or _clean_text(text, repaired) is None:
        return None
    return row_text(with_contents(row, [content or "" for content in contents]))


def _text_of_row(text: str) -> str:
    """Return what the filters see of a row: its texts, one below the other."""
    return "\n\n".join(contents_of(json.loads(text)))
