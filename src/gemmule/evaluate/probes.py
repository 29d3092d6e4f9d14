"""Probes of a story that need no other model: length, repetition, variety, quotation marks and names."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from gemmule.evaluate.overlap import words_of

_NAME = re.compile(r"(?<![.!?\"“”'‘’:\n] )(?<![\"“‘\n])(?<!^)\b[A-Z][a-z]+\b")
_CAPITALIZED = re.compile(r"\b[A-Z][a-z]+\b")


class Probes(NamedTuple):
    """What a text shows of itself."""

    words: int
    distinct_1: float | None  # share of its words that are different ones; None where it has none
    distinct_2: float | None  # the same of its pairs of words
    repeated_span: int  # words of the longest span that occurs again
    quotes_closed: bool  # whether every quotation mark that opens is closed in its paragraph
    names_closed: bool  # whether no name appears for the first time in the last third


def probe(text: str) -> Probes:
    """Probe a text."""
    words = words_of(text)
    return Probes(
        len(words),
        distinct([words], 1),
        distinct([words], 2),
        repeated_span(words),
        quotes_closed(text),
        names_closed(text),
    )


def distinct(texts: Sequence[Sequence[str]], length: int) -> float | None:
    """Return the share of different ones among the spans of so many words; None where there is none."""
    spans = [tuple(words[at : at + length]) for words in texts for at in range(len(words) - length + 1)]
    return len(set(spans)) / len(spans) if spans else None


def repeated_span(words: Sequence[str]) -> int:
    """Return the length of the longest span of words that occurs at two places, which may overlap."""
    suffixes = sorted(tuple(words[at:]) for at in range(len(words)))  # those that begin alike are neighbours
    return max((_common(one, other) for one, other in pairwise(suffixes)), default=0)


def quotes_closed(text: str) -> bool:
    """Return whether quotation marks come in pairs in every paragraph."""
    return all(
        paragraph.count('"') % 2 == 0 and paragraph.count("“") == paragraph.count("”") for paragraph in text.split("\n")
    )


def names_closed(text: str) -> bool:
    """Return whether the last third of a text brings no new name, a capitalized word inside of a sentence."""
    names = {match[0] for match in _NAME.finditer(text)}
    first: dict[str, int] = {}
    for match in _CAPITALIZED.finditer(text):
        if match[0] in names:
            first.setdefault(match[0], match.start())
    return all(start < len(text) * 2 / 3 for start in first.values())


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
