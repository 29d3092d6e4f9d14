"""What is done to documents before they are learned, and the count of it."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

from gemmule.data.readers import Document

# What cp1252 makes of the bytes 80 to 9F, back to the byte; the five that it leaves undefined stand for themselves.
_CP1252 = {ord(bytes([byte]).decode("cp1252", errors="ignore") or chr(byte)): byte for byte in range(0x80, 0xA0)}


class CleanDocument(NamedTuple):
    """A document worth learning."""

    text: str
    key: int  # 64 bits that tell texts apart, whitespace aside
    log_probability: float | None


class KeySet:
    """A set of 64-bit keys in at most 32 bytes each: ten million documents fit where a `set` would take a gigabyte."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, key: int) -> bool:
        """Add a key; return whether it is new."""
        if 2 * self._count >= len(self._slots):
            self._grow()
        slot = self._find(key)
        if self._slots[slot]:
            return False
        self._slots[slot] = key or 1
        self._count += 1
        return True

    def __contains__(self, key: int) -> bool:
        return bool(self._slots[self._find(key)])

    def __len__(self) -> int:
        return self._count

    def _find(self, key: int) -> int:
        """Return the slot where the key is or would go; an empty slot holds 0."""
        key = key or 1
        mask = len(self._slots) - 1
        slot = key & mask
        while self._slots[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(8 * 2 * len(old)))
        for key in old:
            if key:
                self._slots[self._find(key)] = key


def clean_documents(
    documents: Iterable[Document], tally: Counter[str], seen: KeySet, withheld: KeySet
) -> Iterator[CleanDocument]:
    """Yield each document worth learning once, repaired; count in `tally` what is dropped and why.

    Texts whose probability is known stay as they are, and as often as they come. `seen` is added to; nothing of
    `withheld` is yielded.
    """
    for document in documents:
        tally["read"] += 1
        text = document.text if document.log_probability is not None else _clean_text(document.text, tally)
        if not isinstance(text, str):
            tally["not_utf8"] += 1
        elif not text:
            tally["empty"] += 1
        elif (key := text_key(text)) in withheld:
            tally["shared"] += 1
        elif not seen.add(key) and document.log_probability is None:
            tally["duplicate"] += 1
        else:
            yield CleanDocument(text, key, document.log_probability)


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
