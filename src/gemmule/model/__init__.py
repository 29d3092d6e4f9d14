"""Gemma 3 itself: no files, no ranks, no text."""
