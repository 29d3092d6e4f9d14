"""Text to token ids and back, in Gemma's conventions; knows nothing of tensors."""

from gemmule.tokenizer.streaming import TextStream
from gemmule.tokenizer.tokenizer import Tokenizer
from gemmule.tokenizer.training import TokenizerSettings, train_tokenizer

__all__ = ["TextStream", "Tokenizer", "TokenizerSettings", "train_tokenizer"]
