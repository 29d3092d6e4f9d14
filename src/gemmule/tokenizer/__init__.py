"""Text to token ids and back, in Gemma's conventions; knows nothing of tensors."""

from gemmule.tokenizer.settings import TokenizerSettings
from gemmule.tokenizer.streaming import TextStream
from gemmule.tokenizer.tokenizer import Tokenizer

__all__ = ["TextStream", "Tokenizer", "TokenizerSettings"]
