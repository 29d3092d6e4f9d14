"""Parser of stories: which line of the grammar a sentence is, and what fills its blanks, right or wrong."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gemmule.storybook.grammar import PRONOUNS, Blank, Line, Option, book

NAMED = ("hero", "friend")

_TOKEN = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*|[^\sA-Za-z]")


class Token(NamedTuple):
    """A word or another single character, and its position in the text."""

    text: str
    start: int
    stop: int


class Match(NamedTuple):
    """A line matched in a text, the index of the first token after it, and the contents of its blanks."""

    line: Line
    stop: int
    blanks: tuple[tuple[Blank, Option], ...]

    def render(self) -> str:
        """Return the text of the line as matched, with normalized white space."""
        shown = (blank.render(option) for blank, option in self.blanks)
        return "".join(part if isinstance(part, str) else next(shown) for part in self.line.parts)


def split(text: str) -> list[Token]:
    """Tokenize a text into words and single other characters, without white space."""
    return [Token(found[0], *found.span()) for found in _TOKEN.finditer(text)]


def spell(text: str) -> tuple[str, ...]:
    """Return the texts of a text's tokens."""
    return tuple(_TOKEN.findall(text))


def match_lines(words: Sequence[str], start: int, moment: str | None = None) -> list[Match]:
    """Match the lines of one moment, or of all, at token `start`, with any contents of their blanks."""
    candidates = _first_words(moment).get(words[start], ())
    return [match for line in candidates if (match := _match_line(line, words, start))]


def _match_line(line: Line, words: Sequence[str], start: int) -> Match | None:
    at = start
    blanks: list[tuple[Blank, Option]] = []
    for part in _pattern(line):
        if isinstance(part, Blank):
            found = _match_blank(part, words, at)
            if not found:
                return None
            option, at = found
            blanks.append((part, option))
        elif tuple(words[at : at + len(part)]) == part:
            at += len(part)
        else:
            return None
    return Match(line, at, tuple(blanks))


def _match_blank(blank: Blank, words: Sequence[str], at: int) -> tuple[Option, int] | None:
    forms, lengths = _forms(blank)
    for length in lengths:
        option = forms.get(tuple(words[at : at + length]))
        if option:
            return option, at + length
    return None


@functools.cache
def _pattern(line: Line) -> tuple[Blank | tuple[str, ...], ...]:
    return tuple(part if isinstance(part, Blank) else spell(part) for part in line.parts)


@functools.cache
def _first_words(moment: str | None) -> Mapping[str, tuple[Line, ...]]:
    """Group the lines of a moment (None: of all) by each word they can begin with."""
    moments = book().moments
    lines = moments[moment] if moment else [line for each in moments.values() for line in each]
    grouped: dict[str, dict[Line, None]] = {}
    for line in lines:
        first = _pattern(line)[0]
        words = {form[0] for form in _forms(first)[0]} if isinstance(first, Blank) else {first[0]}
        for word in words:
            grouped.setdefault(word, {})[line] = None
    return {word: tuple(found) for word, found in grouped.items()}


@functools.cache
def _forms(blank: Blank) -> tuple[Mapping[tuple[str, ...], Option], tuple[int, ...]]:
    """Map each possible content of a blank, as tokens, to its option; return also the lengths that occur."""
    if blank.pronoun:
        options: Sequence[Option] = [Option("", 1, pronoun=pronoun) for pronoun in PRONOUNS]
    elif blank.variable in NAMED and not blank.fresh:
        options = [option for name in NAMED for option in book().lexicons[name]]
    else:
        options = book().lexicons[blank.variable]
    forms = {spell(blank.render(option)): option for option in options}
    return forms, tuple(sorted({len(form) for form in forms}, reverse=True))
