"""Consistency checker of stories: parses a text, replays it, and reports contradictions.

A text is parsed line by line with any contents of the blanks, and replayed with a state: who is who, which thing it
is, who has it. Every story of the grammar is consistent. What is odd but contradicts nothing, a pelican in the forest,
a torn drum, is consistent too, though its probability is 0.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten

from gemmule.storybook.grammar import (
    END,
    START,
    Act,
    Blank,
    Choice,
    Option,
    Table,
    Tags,
    book,
    line_table,
    meets,
    word_table,
)
from gemmule.storybook.parser import NAMED, Match, Token, match_lines, split

_MOST_CHARACTERS = 6000  # six times as many as in the longest story
_MOST_UNREAD = 20  # sentences; then the rest is not read


@dataclass(frozen=True)
class Verdict:
    """The verdict on a text: all sentences parse, nothing contradicts, it ends; and the problems found.

    `consistent` implies the other two, and is the same as having no problems.
    """

    parses: bool
    consistent: bool
    ends: bool
    problems: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether this is a complete story without a problem."""
        return self.parses and self.consistent and self.ends

    def __str__(self) -> str:
        return "consistent" if self.consistent else "inconsistent: " + "; ".join(self.problems)


@dataclass
class World:
    """What is known at one point of a text: the state of the replay."""

    moment: str | None = START  # None: unknown, after an unparsed sentence
    chosen: dict[str, Option] = field(default_factory=dict)
    tags: Tags = frozenset()
    holder: str = "nobody"  # empty: unknown
    text: list[str] = field(default_factory=list)
    log_probability: float = 0.0
    unread: int = 0
    problems: list[str] = field(default_factory=list)


def check_story(text: str) -> Verdict:
    """Check any text, ignoring differences in white space."""
    if len(text) > _MOST_CHARACTERS:
        return Verdict(False, False, False, (f"too long for a story: {len(text)} characters",))
    tokens = split(text)
    if not tokens:
        return Verdict(False, False, False, ("there is no story",))
    world = _replay(text, tokens)
    return Verdict(world.unread == 0, not world.problems, world.moment == END, tuple(dict.fromkeys(world.problems)))


def read_story(text: str) -> World:
    """Return what is known after a text: what was chosen for each blank, who has the thing, and the problems found."""
    return _replay(text, split(text[:_MOST_CHARACTERS]))


def log_probability(text: str) -> float:
    """Return the log-probability of exactly this text under the grammar, in nats; -inf where it is impossible."""
    world = read_story(text)
    exact = not world.problems and "".join(world.text).lstrip() == text
    return world.log_probability if exact else -math.inf


def _replay(text: str, tokens: Sequence[Token]) -> World:
    world = World()
    at = 0
    words = [token.text for token in tokens]
    while at < len(tokens) and world.moment != END and world.unread < _MOST_UNREAD:
        match = _find_line(world, words, at)
        stop = match.stop if match else _skip_sentence(words, at)
        quote = _quote(text[tokens[at].start : tokens[stop - 1].stop])
        if match:
            _follow_line(world, match, quote)
        else:
            world.problems.append(f"not from the book: {quote}")
            world.moment, world.holder, world.unread = None, "", world.unread + 1
        at = stop
    if world.moment != END:
        world.problems.append("the story does not end")
    elif at < len(tokens):
        world.unread += 1
        world.problems.append(f"the story goes on after its end: {_quote(text[tokens[at].start :])}")
    return world


def _find_line(world: World, words: Sequence[str], at: int) -> Match | None:
    """Return the match at word `at`: of this moment the one with fewest contradictions, else the longest of all."""

    def count_contradictions(match: Match) -> int:
        return len(list(_contradictions(world, match)))

    expected = match_lines(words, at, world.moment) if world.moment else []
    if expected:
        return min(expected, key=count_contradictions)
    return min(match_lines(words, at), key=lambda match: (-match.stop, count_contradictions(match)), default=None)


def _follow_line(world: World, match: Match, quote: str) -> None:
    line, blanks = match.line, match.blanks
    if world.moment is not None and line.moment != world.moment:
        world.problems.append(f"out of order: {quote}")
    elif not meets(world.tags | _word_tags(), line.needs):
        world.problems.append(f"belongs to another story: {quote}")
    _weigh(world, line_table(line.moment, world.tags & book().asks[line.moment]), line)
    world.problems += _contradictions(world, match)
    world.tags |= line.gives
    for blank, option in blanks:
        if blank.fresh:
            _introduce(world, blank.variable, option, quote)
    shown = {blank.variable: option for blank, option in blanks if not blank.pronoun}
    for act in line.acts:
        _perform(world, act, world.chosen | shown)
    world.text.append(("\n" if line.paragraph else " ") + match.render())
    world.moment = line.following


def _introduce(world: World, variable: str, option: Option, quote: str) -> None:
    if variable in NAMED and not meets(world.tags, option.needs):
        world.problems.append(f"{option.text} is no name for this one: {quote}")
    _weigh(world, word_table(variable, world.tags & book().asks[variable]), option)
    world.chosen[variable] = option
    world.tags |= option.gives


def _weigh(world: World, table: Table[Choice], option: Choice) -> None:
    """Add the log-probability of a choice, -inf where it was not among the options."""
    possible = option in table.options
    world.log_probability += table.log_probabilities[table.options.index(option)] if possible else -math.inf


@functools.cache
def _word_tags() -> Tags:
    """Return all tags that lexicon entries add."""
    return frozenset().union(*(option.gives for options in book().lexicons.values() for option in options))


def _contradictions(world: World, match: Match) -> Iterator[str]:
    """Yield the contradictions of a line with the story so far."""
    chosen = dict(world.chosen)
    for blank, option in match.blanks:
        if blank.fresh:
            chosen[blank.variable] = option
        elif blank.variable not in chosen:
            if not world.unread:
                yield f"{blank.render(option)} comes from nowhere"
        elif blank.pronoun and option.pronoun != chosen[blank.variable].pronoun:
            yield f"{blank.render(option).lower()} used for {chosen[blank.variable].text}"
        elif not blank.pronoun and option is not chosen[blank.variable]:
            yield _describe_change(blank, chosen, option)


def _describe_change(blank: Blank, chosen: Mapping[str, Option], option: Option) -> str:
    before = chosen[blank.variable].text
    if blank.variable not in NAMED:
        kind = "things change" if blank.variable in ("look", "noun") else f"the {blank.variable} changes"
        return f"{kind}: {before} became {option.text}"
    known = any(chosen.get(name) is option for name in NAMED)
    return f"{option.text} stands where {before} belongs" if known else f"names change: {before} became {option.text}"


def _perform(world: World, act: Act, people: Mapping[str, Option]) -> None:
    """Apply an act to who has the thing, and report where it is impossible."""
    if not people.keys() >= {act.who, act.whom or act.who}:
        world.holder = ""
        return
    who, whom = (_call(variable, people) for variable in (act.who, act.whom or act.who))
    expected, after = {
        "has": (who, who),
        "gets": ("nobody", who),
        "finds": ("nobody", who),
        "takes": (world.holder, who),
        "loses": (who, "nobody"),
        "gives": (who, whom),
    }[act.verb]
    if world.holder and world.holder != expected:
        thing = " ".join(people[part].text for part in ("look", "noun") if part in people) or "thing"
        to = f" to {whom}" if act.whom else ""
        world.problems.append(f"{who} {act.verb} the {thing}{to}, but {world.holder} has it")
    world.holder = after


def _call(variable: str, people: Mapping[str, Option]) -> str:
    return people[variable].text if variable in NAMED else f"the {people[variable].text}"


def _skip_sentence(words: Sequence[str], at: int) -> int:
    """Return the end of the sentence at word `at`, including a closing quotation mark."""
    stop = next((number + 1 for number in range(at, len(words)) if words[number] in ".!?"), len(words))
    inside = words[at:stop].count('"') % 2 == 1
    return stop + 1 if inside and words[stop : stop + 1] == ['"'] else stop


def _quote(text: str) -> str:
    return f"<{shorten(text, 60, placeholder=' ...')}>"
