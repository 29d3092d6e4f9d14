"""The bytes of text of each token, from the decoder in tokenizer.json."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

WORD_MARK = "\u2581"  # SentencePiece's visible space
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_CONCATENATING = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"}


class Pieces:
    """Text of single tokens according to the decoder of a parsed tokenizer.json."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        decoders = {decoder["type"]: decoder for decoder in _flatten(description.get("decoder"))}
        self._added = {token["id"]: token for token in description.get("added_tokens", ())}
        self._marked, self._fallback = "Metaspace" in decoders or "Replace" in decoders, "ByteFallback" in decoders
        self._byte_of = _byte_level_alphabet() if "ByteLevel" in decoders else {}
        # Text of special tokens.
        self.specials = {index: token["content"].encode() for index, token in self._added.items() if token["special"]}
        # Whether decoding is concatenation; false for decoders with context, such as WordPiece's.
        self.concatenate = bool(decoders) and decoders.keys() <= _CONCATENATING
        # The space that a dummy prefix adds at the start.
        dummy_prefix = decoders.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        self.drop_first_space = "Strip" in decoders or dummy_prefix

    def text(self, token: str, index: int) -> bytes:
        """Return the bytes of a token within a text; a special token has none."""
        if index in self._added:
            return b"" if self._added[index]["special"] else token.encode()
        if self._fallback and token[:1] == "<" and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._byte_of and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return (token.replace(WORD_MARK, " ") if self._marked else token).encode()


def merge_pairs(merges: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield merges as pairs, also where they are strings with a space between, as in older files."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _flatten(inner)]


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's byte-level alphabet: printable bytes map to themselves, others to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
