"""Tokenizer settings, and the special tokens and bytes of a trained vocabulary."""

from collections.abc import Iterator

from pydantic import Field

from gemmule.fields import Count, Text
from gemmule.settings import Problem, Settings

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")  # ids 0 to 5
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # ids 6 to 261; byte fallback
FIRST_PIECE = len(SPECIALS) + len(BYTES)


class TokenizerSettings(Settings):
    """The vocabulary: trained on the training documents, or taken as it is from a file."""

    vocab_size: Count = Field(4096, description="ids in all: 6 special tokens, 256 bytes, then characters and pieces")
    path: Text | None = Field(
        None, description="an existing tokenizer.json or a folder with one, which decides the number of ids"
    )

    def problems(self) -> Iterator[Problem]:
        """Refuse a vocabulary without room for text."""
        if self.path is None and self.vocab_size <= FIRST_PIECE:
            least = f"use {FIRST_PIECE + 1} or more, for English at least 512"
            advice = f"too small: special tokens and bytes alone take {FIRST_PIECE}; {least}"
            yield Problem("vocab_size", self.vocab_size, advice)
