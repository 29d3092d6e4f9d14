"""Grow your own Gemma 3: from raw text to a trained, measured language model."""

__version__ = "0.1.0"
