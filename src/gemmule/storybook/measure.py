"""The number of stories and their exact entropy, computed by dynamic programming over the grammar, without sampling.

Only the tags that later options depend on matter to the rest of a story, so all other states are merged. With facts
given, only the stories that have them count: the entropy is then that of a story given its facts.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gemmule.storybook.grammar import END, START, Blank, Line, Option, Tags, book, line_table, word_table

# What the story is about: the tags of which every story has exactly one.
PLOT = "plot"
PLOTS = ("lost", "stuck", "broken", "taken", "quarrel", "found", "baby", "present")

# What a story is still to have: the text that a lexicon is to contribute, or the plot.
Wanted = frozenset[tuple[str, str]]


class Measure(NamedTuple):
    """The number of different stories, the exact mean of -log p over them in nats, and the log-probability of all."""

    stories: int
    nats: float
    log_probability: float = 0.0


def measure_stories(facts: Mapping[str, str] | None = None) -> Measure:
    """Return the number of stories and their entropy, the lower bound of any model's loss in nats per story.

    With facts, such as {"hero": "Leo", "plot": "lost"}, those of the stories that have them; p(story | facts) is then
    p(story) / p(facts), and the mean is over -log p(story | facts). Keys are lexicons of which a story uses at most one
    entry, or `PLOT`. Facts that no story has together have the log-probability -inf.
    """
    return measure_rest(START, frozenset(), frozenset((facts or {}).items()))


def count_stories() -> int:
    """Return the number of different stories: the derivations, since the grammar is unambiguous."""
    return measure_stories().stories


def measure_rest(moment: str, tags: Tags, wanted: Wanted = frozenset()) -> Measure:
    """Measure the continuations of a moment, for a story with these tags that is still to have what is wanted."""
    mass = _measure_rest(moment, tags & live_tags(moment), wanted)
    if not mass.probability:
        return Measure(0, 0.0, -math.inf)
    log_probability = math.log(mass.probability)
    return Measure(mass.ways, mass.nats / mass.probability + log_probability, log_probability)


class _Mass(NamedTuple):
    """Some derivations: how many, the sum of their probabilities p, and the sum of -p log p."""

    ways: int
    probability: float
    nats: float

    def plus(self, other: "_Mass") -> "_Mass":
        """Return the union of disjoint derivations."""
        return _Mass(self.ways + other.ways, self.probability + other.probability, self.nats + other.nats)

    def times(self, other: "_Mass") -> "_Mass":
        """Return each of these followed by each of the others."""
        nats = self.nats * other.probability + self.probability * other.nats
        return _Mass(self.ways * other.ways, self.probability * other.probability, nats)


_NOTHING, _ONE = _Mass(0, 0.0, 0.0), _Mass(1, 1.0, 0.0)


def _choice(log_probability: float) -> _Mass:
    probability = math.exp(log_probability)
    return _Mass(1, probability, -probability * log_probability)


@functools.cache
def _measure_rest(moment: str, tags: Tags, wanted: Wanted) -> _Mass:
    """Sum over the continuations of a moment, for a story with these of the tags that later options depend on."""
    if moment == END:
        return _NOTHING if wanted else _ONE
    if not {kind for kind, _ in wanted} <= _contributions(moment):
        return _NOTHING
    table = line_table(moment, tags & book().asks[moment])
    total = _NOTHING
    for line, log_probability in zip(table.options, table.log_probabilities, strict=True):
        own = frozenset((kind, text) for kind, text in wanted if kind == PLOT or kind in _fresh_blanks(line))
        for (after, left), mass in _fill_blanks(line, tags, own).items():
            rest = _measure_rest(line.following, after, left | wanted - own)
            total = total.plus(_choice(log_probability).times(mass).times(rest))
    return total


@functools.cache
def _fill_blanks(line: Line, tags: Tags, wanted: Wanted) -> Mapping[tuple[Tags, Wanted], _Mass]:
    """Return the combinations of a line's blanks, by the tags that matter afterwards and what is wanted still."""
    plots = {(PLOT, tag) for tag in line.gives & set(PLOTS)}
    if plots and any(kind == PLOT for kind, _ in wanted - plots):
        return {}
    shares = {(tags | line.gives, wanted - plots): _ONE}
    for lexicon in _fresh_blanks(line):
        extended: dict[tuple[Tags, Wanted], _Mass] = defaultdict(lambda: _NOTHING)
        for (before, left), mass in shares.items():
            text = dict(left).get(lexicon)
            for option, log_probability in _entries(lexicon, before & book().asks[lexicon]):
                if text is None or option.text == text:
                    after = before | option.gives, left - {(lexicon, option.text)}
                    extended[after] = extended[after].plus(mass.times(_choice(log_probability)))
        shares = extended
    alive: dict[tuple[Tags, Wanted], _Mass] = defaultdict(lambda: _NOTHING)
    for (after_tags, left), mass in shares.items():
        kept = after_tags & live_tags(line.following), left
        alive[kept] = alive[kept].plus(mass)
    return alive


def _entries(lexicon: str, tags: Tags) -> Iterator[tuple[Option, float]]:
    table = word_table(lexicon, tags)
    return zip(table.options, table.log_probabilities, strict=True)


@functools.cache
def live_tags(moment: str) -> Tags:
    """Return the tags that lines and lexicons can depend on from this moment on."""
    if moment == END:
        return frozenset()
    asks = book().asks
    live = asks[moment]
    for line in book().moments[moment]:
        live |= live_tags(line.following).union(*(asks[lexicon] for lexicon in _fresh_blanks(line)))
    return live


@functools.cache
def _contributions(moment: str) -> frozenset[str]:
    """Return the lexicons that the lines from this moment on can use, and `PLOT` where it is still open."""
    if moment == END:
        return frozenset()
    found: set[str] = set()
    for line in book().moments[moment]:
        found.update(_fresh_blanks(line), _contributions(line.following), [PLOT] if line.gives & set(PLOTS) else [])
    return frozenset(found)


@functools.cache
def _fresh_blanks(line: Line) -> list[str]:
    return [part.variable for part in line.parts if isinstance(part, Blank) and part.fresh]
