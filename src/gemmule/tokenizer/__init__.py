"""Tokenizer: text to token ids and back, in Gemma's conventions, without torch."""

from gemmule.tokenizer.settings import TokenizerSettings
from gemmule.tokenizer.streaming import TextStream
from gemmule.tokenizer.tokenizer import Tokenizer

__all__ = ["TextStream", "Tokenizer", "TokenizerSettings"]
