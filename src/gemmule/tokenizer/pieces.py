"""What each token stands for, in bytes of text, read from the description that tokenizer.json gives of its decoder."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

WORD_MARK = "\u2581"  # SentencePiece's visible space
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_CONCATENATING = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"}


class Pieces(NamedTuple):
    """The text of a vocabulary, one entry an id."""

    texts: list[bytes]  # what each id stands for in running text; empty for special tokens and unused ids
    specials: dict[int, bytes]  # how a special token is written
    concatenate: bool  # joining the pieces is decoding; false for decoders that look at neighbours, such as WordPiece's
    drop_first_space: bool  # the space that a dummy prefix put before the text


def read_pieces(description: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Pieces:
    """Return what each id of `vocabulary` stands for under the decoder of a parsed tokenizer.json."""
    decoders = {decoder["type"]: decoder for decoder in _flatten(description.get("decoder"))}
    added = {token["id"]: token for token in description.get("added_tokens", ())}
    marked, fallback = "Metaspace" in decoders or "Replace" in decoders, "ByteFallback" in decoders
    byte_of = _byte_level_alphabet() if "ByteLevel" in decoders else {}
    texts = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index in added:
            texts[index] = b"" if added[index]["special"] else token.encode()
        elif fallback and token[:1] == "<" and (match := BYTE_TOKEN.fullmatch(token)):
            texts[index] = bytes([int(match[1], 16)])
        elif byte_of and all(character in byte_of for character in token):
            texts[index] = bytes(byte_of[character] for character in token)
        else:
            texts[index] = (token.replace(WORD_MARK, " ") if marked else token).encode()
    return Pieces(
        texts,
        {index: token["content"].encode() for index, token in added.items() if token["special"]},
        bool(decoders) and decoders.keys() <= _CONCATENATING,
        "Strip" in decoders or decoders.get("Metaspace", {}).get("prepend_scheme", "never") != "never",
    )


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _flatten(inner)]


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's stand-in for each byte: itself where printable, else the next free character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
