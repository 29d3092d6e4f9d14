"""The settings of the vocabulary, and what each that is trained here begins with."""

from collections.abc import Iterator

from pydantic import Field

from gemmule.recipe import Problem, Settings

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")  # ids 0 to 5
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # ids 6 to 261; ordinary entries, what no piece covers
FIRST_PIECE = len(SPECIALS) + len(BYTES)


class TokenizerSettings(Settings):
    """The vocabulary: trained on the training documents, or taken as it is from a file."""

    vocab_size: int = Field(4096, description="ids in all: 6 special tokens, 256 bytes, then characters and pieces")
    path: str | None = Field(None, description="an existing tokenizer.json or a folder with one; its size is its own")

    def problems(self) -> Iterator[Problem]:
        """Yield a vocabulary too small for any text."""
        if self.path is None and self.vocab_size <= FIRST_PIECE:
            advice = f"too small: special tokens and bytes alone take {FIRST_PIECE}; use 512 or more"
            yield Problem("vocab_size", self.vocab_size, advice)
