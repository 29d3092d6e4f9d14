"""What tests of several packages share; torch is loaded only by the tests that need it."""

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from gemmule.tokenizer import Tokenizer, train_tokenizer
from sentences import SENTENCES

if TYPE_CHECKING:
    from gemmule.model.config import Gemma3Config
    from gemmule.model.gemma3 import Gemma3

# A busy machine is not a failure.
settings.register_profile("gemmule", deadline=None)
settings.load_profile("gemmule")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A vocabulary of 380 ids trained on a few sentences."""
    return train_tokenizer(SENTENCES, vocab_size=380)


@pytest.fixture(scope="session")
def tiny_config() -> "Gemma3Config":
    """Seven layers of both kinds."""
    import tiny

    return tiny.tiny_config()


@pytest.fixture(scope="session")
def tiny_model(tiny_config: "Gemma3Config") -> "Gemma3":
    """A model of `tiny_config` with lively weights; shared, so leave it as it is."""
    import tiny

    return tiny.lively_model(tiny_config)
