"""A small vocabulary, and text with everything that goes wrong."""

import pytest
from awkward_text import WORDS, sentences
from hypothesis import strategies as st

from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.training import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(sentences(400, seed=1), vocab_size=512)


@pytest.fixture(scope="session")
def texts() -> st.SearchStrategy[str]:
    """Any text at all, and text made of what tokenizers trip over."""
    awkward = [*WORDS, " ", "  ", "\n", "\r\n", "\t\t", "\u2581", "\u2581the", "<bos>", "<eos>", "<0x41>", "<0x0A>"]
    awkward += ["<start_of_turn>user", "\x00", "\x7f", "\ufffd", "\ufeff", "e\u0301", "\u200d", "\U0001f984", "\u00bd"]
    return st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(awkward)).map("".join)
