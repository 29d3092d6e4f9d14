"""What is done to documents before they are learned, unit by unit, and the count of it."""

from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.data.filters import reason_to_drop
from gemmule.data.parts import PartWriter
from gemmule.data.readers import Document, Misread
from gemmule.data.settings import DataSettings
from gemmule.data.sources import Unit, read_span
from gemmule.data.work import finish, finished

# What cp1252 makes of the bytes 80 to 9F, back to the byte; the five that it leaves undefined stand for themselves.
_CP1252 = {ord(bytes([byte]).decode("cp1252", errors="ignore") or chr(byte)): byte for byte in range(0x80, 0xA0)}


class CleanDocument(NamedTuple):
    """A document worth learning, as far as it alone can tell."""

    text: str
    key: int  # 64 bits that tell texts apart, whitespace aside
    log_probability: float | None


def clean_unit(unit: Unit, settings: DataSettings, folder: Path) -> dict[str, Any]:
    """Write the clean documents of a unit to a part in `folder`, unless it is there; return what was counted.

    The same unit makes the same bytes, in whatever process.
    """
    note = folder / f"{unit.name}.json"
    known = finished(note)
    return _clean_unit(unit, settings, note) if known is None else known


def _clean_unit(unit: Unit, settings: DataSettings, note: Path) -> dict[str, Any]:
    tally: Counter[str] = Counter()
    misread = []
    with PartWriter(note.parent, unit.name, with_signatures=settings.near_duplicates is not None) as part:
        for span in unit.spans:
            found = Misread()
            for document in read_span(span, settings):
                found = found.after(document)
                if clean := clean_document(document, settings, tally):
                    part.append(clean.text, clean.key, clean.log_probability)
            misread.append(found)
    result = {"tally": tally, "misread": misread, "documents": part.documents, "bytes": part.bytes}
    finish(note, result, part.files)
    return result


def clean_document(document: Document, settings: DataSettings, tally: Counter[str]) -> CleanDocument | None:
    """Return the document repaired, or None where it is to be dropped; count in `tally` what was done and why.

    A text whose probability is known stays as it is.
    """
    tally["read"] += 1
    known = document.log_probability is not None
    text = document.text if known else _clean_text(document.text, tally)
    if not isinstance(text, str):
        tally["not_utf8"] += 1
    elif not text:
        tally["empty"] += 1
    elif not known and (reason := reason_to_drop(text, settings)):
        tally[reason] += 1
    else:
        return CleanDocument(text, text_key(text), document.log_probability)
    return None


def text_key(text: str) -> int:
    """Return 64 bits of a hash that ignores how the words are spaced."""
    words = " ".join(text.split())
    return int.from_bytes(blake2b(words.encode(), digest_size=8).digest(), "little")


def repair_mojibake(text: str) -> str:
    """Return the text that was UTF-8 before it was read as cp1252, where all of it decodes back exactly."""
    if text.isascii():
        return text
    try:
        return text.translate(_CP1252).encode("latin-1").decode()
    except UnicodeError:
        return text


def _clean_text(text: str | bytes, tally: Counter[str]) -> str | None:
    """Return the text repaired and without space around it, or None where it is not UTF-8."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        text.encode()  # half of a surrogate pair, as JSON can spell it, is no text
    except UnicodeError:
        return None
    repaired = repair_mojibake(text)
    tally["repaired"] += repaired != text
    return repaired.replace("\r\n", "\n").strip()
