"""Streaming detokenization: complete characters at once, incomplete UTF-8 buffered."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """Decode one id at a time; the concatenated output equals `Tokenizer.decode` of all ids."""

    def feed(self, token: int) -> str:
        """Add an id and return the new final characters."""

    def end(self) -> str:
        """Return the buffered characters."""


class PieceStream:
    """Stream for tokenizers whose decoding is concatenation."""

    def __init__(self, piece: Callable[[int], bytes], *, drop_first_space: bool) -> None:
        self._piece = piece
        self._drop_first_space = drop_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Add an id and return the characters that are now complete."""
        return self._from_start(self._utf8.decode(self._piece(token)))

    def end(self) -> str:
        """Return a replacement character for incomplete bytes."""
        return self._from_start(self._utf8.decode(b"", final=True))

    def _from_start(self, text: str) -> str:
        if text and self._drop_first_space:
            self._drop_first_space = False
            return text.removeprefix(" ")
        return text


class RedecodingStream:
    """Stream for other tokenizers: decodes all ids at each step and returns the new text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._sent = ""

    def feed(self, token: int) -> str:
        """Add an id and return the characters that no longer change."""
        self._ids.append(token)
        text = self._decode(self._ids).rstrip(REPLACEMENT)
        return self._send(text) if text.startswith(self._sent) else ""

    def end(self) -> str:
        """Return the buffered characters."""
        return self._send(self._decode(self._ids))

    def _send(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._sent = text
        return new
