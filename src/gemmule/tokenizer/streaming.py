"""Ids to text while they arrive: complete characters at once, incomplete UTF-8 held back."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """Decodes one id at a time; what `feed` and `end` returned, joined, is what `Tokenizer.decode` makes of the ids."""

    def feed(self, token: int) -> str:
        """Take one id and return the characters that are now certain."""

    def end(self) -> str:
        """Return what was held back."""


class PieceStream:
    """The stream for tokenizers whose text is the concatenation of their pieces."""

    def __init__(self, piece: Callable[[int], bytes], *, drop_first_space: bool) -> None:
        self._piece = piece
        self._drop_first_space = drop_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Take one id and return the characters that are now complete."""
        return self._from_start(self._utf8.decode(self._piece(token)))

    def end(self) -> str:
        """Return a replacement character for bytes that never became one."""
        return self._from_start(self._utf8.decode(b"", final=True))

    def _from_start(self, text: str) -> str:
        if text and self._drop_first_space:
            self._drop_first_space = False
            return text.removeprefix(" ")
        return text


class RedecodingStream:
    """The stream for every other tokenizer: decodes all ids again and returns what is new."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._sent = ""

    def feed(self, token: int) -> str:
        """Take one id and return the characters that no longer change."""
        self._ids.append(token)
        text = self._decode(self._ids).rstrip(REPLACEMENT)
        return self._send(text) if text.startswith(self._sent) else ""

    def end(self) -> str:
        """Return what was held back."""
        return self._send(self._decode(self._ids))

    def _send(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._sent = text
        return new
