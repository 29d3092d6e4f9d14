"""The number of stories and their exact entropy, computed by dynamic programming over the grammar, without sampling.

Only the tags that later options depend on matter to the rest of a story, so all other states are merged.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from gemmule.storybook.grammar import END, START, Blank, Line, Tags, book, line_table, word_table


class Measure(NamedTuple):
    """The number of different stories, and the exact mean of -log p over all of them, in nats per story."""

    stories: int
    nats: float


def measure_stories() -> Measure:
    """Return the number of stories and their entropy, the lower bound of any model's loss in nats per story."""
    return _measure_rest(START, frozenset())


def count_stories() -> int:
    """Return the number of different stories: the derivations, since the grammar is unambiguous."""
    return measure_stories().stories


class _Share(NamedTuple):
    ways: int
    probability: float


@functools.cache
def _measure_rest(moment: str, tags: Tags) -> Measure:
    """Measure the continuations of a moment, for a story with these of the tags that later options depend on."""
    if moment == END:
        return Measure(1, 0.0)
    table = line_table(moment, tags & book().asks[moment])
    count, nats = 0, 0.0
    for line, log_probability in zip(table.options, table.log_probabilities, strict=True):
        shares, own = _fill_blanks(line, tags)
        rests = [(share, _measure_rest(line.following, after)) for after, share in shares.items()]
        count += sum(share.ways * rest.stories for share, rest in rests)
        expected = sum(share.probability * rest.nats for share, rest in rests)
        nats += line.weight / table.total * (own + expected - log_probability)
    return Measure(count, nats)


def _fill_blanks(line: Line, tags: Tags) -> tuple[Mapping[Tags, _Share], float]:
    """Marginalize over the fresh blanks of a line: the distribution of the tags afterwards, and the entropy."""
    shares = {tags | line.gives: _Share(1, 1.0)}
    nats = 0.0
    for lexicon in _fresh_blanks(line):
        extended: dict[Tags, _Share] = defaultdict(lambda: _Share(0, 0.0))
        for before, (ways, probability) in shares.items():
            table = word_table(lexicon, before & book().asks[lexicon])
            for option, log_probability in zip(table.options, table.log_probabilities, strict=True):
                part = probability * option.weight / table.total
                nats -= part * log_probability
                after = before | option.gives
                extended[after] = _Share(extended[after].ways + ways, extended[after].probability + part)
        shares = extended
    alive: dict[Tags, _Share] = defaultdict(lambda: _Share(0, 0.0))
    for after, (ways, probability) in shares.items():
        kept = after & live_tags(line.following)
        alive[kept] = _Share(alive[kept].ways + ways, alive[kept].probability + probability)
    return alive, nats


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


def _fresh_blanks(line: Line) -> list[str]:
    return [part.variable for part in line.parts if isinstance(part, Blank) and part.fresh]
