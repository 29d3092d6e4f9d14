"""Which tokenizer a preparation uses: one that exists, or one to train, whose size may depend on the text."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gemmule.data.stage_cache import cache_key
from gemmule.tokenizer import Tokenizer, TokenizerSettings

log = logging.getLogger(__name__)

# A tokenizer, or the settings of one, which may be chosen by how many bytes of training text there are: then the
# vocabulary has at most so many entries, and fewer where the text is too short for them.
Vocabulary = TokenizerSettings | Tokenizer | Callable[[int], TokenizerSettings]


class ChosenTokenizer(NamedTuple):
    """The tokenizer that is given, or the size of the one to train."""

    given: Tokenizer | None
    vocab_size: int
    at_most: bool = False

    @classmethod
    def of(cls, vocabulary: TokenizerSettings | Tokenizer) -> "ChosenTokenizer":
        """Open the tokenizer, where there is one."""
        given = vocabulary if isinstance(vocabulary, Tokenizer) else _existing_tokenizer(vocabulary)
        return cls(given, vocabulary.vocab_size)

    def key(self, label_key: str) -> str:
        """Return the cache key of the stage that tokenizes."""
        return cache_key(label_key, self.given.fingerprint if self.given else self.vocab_size)


def _existing_tokenizer(settings: TokenizerSettings) -> Tokenizer | None:
    """Load the tokenizer that the settings name, if they do."""
    if settings.path is None:
        return None
    tokenizer = Tokenizer.load(Path(settings.path).expanduser())
    ignored, ids = settings.vocab_size, tokenizer.vocab_size
    if "vocab_size" in settings.model_fields_set and ignored != ids:
        log.info(f"tokenizer.vocab_size = {ignored} is ignored: tokenizer.path has {ids} ids")
    return tokenizer
