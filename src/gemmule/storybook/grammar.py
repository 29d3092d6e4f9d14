"""The storybook's grammar: the notation of its data files, and the parser of it.

A weighted context-sensitive grammar: a chapter is a list of *moments* (states), each a list of *lines* (productions):

    == lost.search > lost.turn
    6 They {+looked} {+spot}, but they found only {a +shabby} {+junk}.
    2 if high: {friend} (jumped|hopped) up to {his} {noun}. [+near, friend finds] > joy

The header names a moment and the one that follows. A line has a weight, perhaps the tags the story must have for it
(`if a|b` either, `if a&b` both), the text, in brackets the tags it adds and the acts that change who has the thing,
and where it leads if not where the header says. Brackets in a header hold for all its lines; so does a ¶, which
begins a paragraph.

In a text `{+spot}` chooses from the lexicon `spot` and `{spot}` repeats what was chosen; `{a look}` puts a or an
before it; `{He}`, `{him}`, `{his}` stand for the hero, `{friend.he}` for somebody else; a capital begins a sentence;
`(jumped|hopped)` chooses evenly.

Every choice is sampled among the weighted options of one *site* (the lines of a moment, the entries of a lexicon)
whose needs the tags meet, and shows in the text before the next is made. No option of a site is a prefix of another,
so the grammar is unambiguous, and the probability of a text is the product of the probabilities of its choices.
"""

import functools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate, chain
from typing import Any, Generic, NamedTuple, TypeVar

START, END = "opening", "end"
Tags = frozenset[str]
Needs = tuple[Tags, ...]  # each group must share a tag with the story

PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her"},
    "he": {"he": "he", "him": "him", "his": "his"},
    "it": {"he": "it", "him": "it", "his": "its"},
}

CHAPTERS = ("beginnings.toml", "plots.toml", "endings.toml")  # in the order of a story
LEXICONS = "lexicons.toml"


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """An entry of a lexicon: what it reads, how often, when it may be chosen, what it adds, and its pronoun."""

    text: str
    weight: int
    needs: Needs = ()
    gives: Tags = frozenset()
    pronoun: str = "it"


@dataclass(frozen=True, slots=True)
class Blank:
    """A slot in a line, filled from a lexicon: with a new choice, or with the earlier one, as its text or a pronoun."""

    variable: str
    fresh: bool
    pronoun: str = ""  # "he", "him", "his", or none
    article: bool = False
    capital: bool = False

    def render(self, option: Option) -> str:
        """Write `option` as this blank shows it."""
        text = PRONOUNS[option.pronoun][self.pronoun] if self.pronoun else option.text
        if self.article:
            text = ("an " if text.startswith(("a", "e", "i", "o", "u", "honest")) else "a ") + text
        return text[0].upper() + text[1:] if self.capital else text


class Act(NamedTuple):
    """A change of who has a thing: `who` gets, finds, loses, takes, has it, or gives it to `whom`."""

    who: str
    verb: str
    whom: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One or two sentences that may be told at a moment, and where they lead."""

    moment: str
    weight: int
    needs: Needs
    gives: Tags
    acts: tuple[Act, ...]
    parts: tuple[str | Blank, ...]
    following: str
    paragraph: bool


Choice = TypeVar("Choice", Option, Line)


class Table(Generic[Choice]):
    """The options at one site, with their cumulative weights and log-probabilities."""

    __slots__ = ("cumulative", "log_probabilities", "options", "total")

    def __init__(self, options: Sequence[Choice]) -> None:
        self.options: tuple[Choice, ...] = tuple(options)
        self.cumulative = tuple(accumulate(option.weight for option in options))
        self.total = self.cumulative[-1] if options else 0
        self.log_probabilities = tuple(math.log(option.weight / self.total) for option in options)


@dataclass(frozen=True)
class Book:
    """The grammar: all moments and lexicons by name, and the tags that the options of each depend on."""

    moments: Mapping[str, tuple[Line, ...]]
    lexicons: Mapping[str, tuple[Option, ...]]
    asks: Mapping[str, Tags]


@functools.cache
def book() -> Book:
    """Parse the whole grammar from its data files, once."""
    chapters = chain.from_iterable(_load(file).values() for file in CHAPTERS)
    lines = [line for chapter in chapters for line in _read_chapter(chapter)]
    moments: dict[str, tuple[Line, ...]] = {}
    for line in lines:
        moments[line.moment] = (*moments.get(line.moment, ()), line)
    groups = _load(LEXICONS).values()
    lexicons = {name: tuple(_read_lexicon(rows)) for group in groups for name, rows in group.items()}
    variables = {part.variable for line in lines for part in line.parts if isinstance(part, Blank)}
    for alternatives in (name for name in variables if name.startswith("(")):
        lexicons[alternatives] = tuple(Option(text, 1) for text in alternatives.strip("()").split("|"))
    asks = {name: _asked(moments[name]) for name in moments} | {name: _asked(lexicons[name]) for name in lexicons}
    return Book(moments, lexicons, asks)


def _load(file: str) -> dict[str, Any]:
    """Read a data file of this package."""
    return tomllib.loads(resources.files(__package__).joinpath(file).read_text(encoding="utf-8"))


@functools.cache
def line_table(moment: str, tags: Tags) -> Table[Line]:
    """Return the lines open at a moment to a story that has, of the tags they ask for, exactly `tags`."""
    return Table([line for line in book().moments[moment] if meets(tags, line.needs)])


@functools.cache
def word_table(lexicon: str, tags: Tags) -> Table[Option]:
    """Return the entries of a lexicon open to a story that has, of the tags they ask for, exactly `tags`."""
    return Table([option for option in book().lexicons[lexicon] if meets(tags, option.needs)])


def meets(tags: Tags, needs: Needs) -> bool:
    """Return whether the tags meet every need."""
    return all(tags & group for group in needs)


def _asked(options: Sequence[Option] | Sequence[Line]) -> Tags:
    return frozenset(tag for option in options for group in option.needs for tag in group)


def _read_needs(text: str | None) -> Needs:
    return tuple(frozenset(group.split("|")) for group in text.split("&")) if text else ()


_ROW = re.compile(r"(\d+)(?: if (\S+))?(?: gives ([\w ]+?))?(?: as (\w+))?: (.*)")


def _read_lexicon(rows: str) -> Iterator[Option]:
    for row in _join_continued(rows):
        match = _ROW.fullmatch(row)
        assert match, row
        weight, needs, gives, pronoun, entries = match.groups()
        for text in entries.split(", "):
            yield Option(text, int(weight), _read_needs(needs), frozenset((gives or "").split()), pronoun or "it")


_HEADER = re.compile(r"== (\S+) > (\S+)( ¶)?(?: \[(.*)\])?")
_LINE = re.compile(r"(\d+)(?: if (\S+):)?( ¶)? (.*?)(?: \[(.*)\])?(?: > (\S+))?")


def _read_chapter(chapter: str) -> Iterator[Line]:
    moment, default, all_paragraphs, shared = "", "", None, ""
    for row in _join_continued(chapter):
        if header := _HEADER.fullmatch(row):
            moment, default, all_paragraphs, shared = header.groups(default="")
            continue
        match = _LINE.fullmatch(row)
        assert match, row
        weight, needs, paragraph, text, notes, following = match.groups()
        effects = [note for group in (shared, notes) if group for note in group.split(", ")]
        yield Line(
            moment=moment,
            weight=int(weight),
            needs=_read_needs(needs),
            gives=frozenset(note[1:] for note in effects if note.startswith("+")),
            acts=tuple(Act(*note.split()) for note in effects if not note.startswith("+")),
            parts=tuple(_read_parts(text)),
            following=following or default,
            paragraph=bool(paragraph or all_paragraphs),
        )


def _join_continued(rows: str) -> list[str]:
    """Split into rows; a row goes on until one begins with a weight or a header."""
    joined: list[str] = []
    for row in filter(None, map(str.strip, rows.splitlines())):
        if row[0].isdigit() or row.startswith("=="):
            joined.append(row)
        else:
            joined[-1] += " " + row
    return joined


_BLANK = re.compile(r"\{(a |A )?(\+)?(\w+)(?:\.(he|him|his|He|His))?\}|(\([^()]*\))")


def _read_parts(text: str) -> Iterator[str | Blank]:
    at = 0
    for match in _BLANK.finditer(text):
        if match.start() > at:
            yield text[at : match.start()]
        article, fresh, name, pronoun, alternatives = match.groups()
        yield Blank(alternatives, fresh=True) if alternatives else _read_blank(article, fresh, name, pronoun)
        at = match.end()
    if at < len(text):
        yield text[at:]


def _read_blank(article: str | None, fresh: str | None, name: str, pronoun: str | None) -> Blank:
    if name.lower() in PRONOUNS["he"]:
        name, pronoun = "hero", name
    shown = article or pronoun or name
    return Blank(name.lower(), bool(fresh), (pronoun or "").lower(), bool(article), shown[0].isupper())
