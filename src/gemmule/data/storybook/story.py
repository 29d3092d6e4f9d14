"""Telling stories: each a walk through the book, drawn from a seed, with the exact probability of its text."""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from statistics import fmean, stdev
from typing import Any, NamedTuple

from gemmule.data.storybook.grammar import END, START, Option, Table, Tags, book, line_table, word_table


@dataclass(frozen=True)
class Story:
    """A story and the natural logarithm of the probability that the book tells exactly this text."""

    text: str
    log_probability: float


class Floor(NamedTuple):
    """The entropy of the stories in nats per story, as the mean over a sample, and its standard error."""

    nats: float
    standard_error: float


def tell_story(seed: int, index: int) -> Story:
    """Tell story number `index` of the endless collection `seed`; the same on every machine and version of Python."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=16).digest()
    draw = random.Random(int.from_bytes(digest, "big")).random
    return _tell(lambda table: bisect_right(table.cumulative, draw() * table.total))


def stories(count: int, seed: int, start: int = 0) -> Iterator[Story]:
    """Tell stories `start` to `start + count - 1` of the collection `seed`."""
    return (tell_story(seed, index) for index in range(start, start + count))


def entropy_floor(sample: Iterable[Story]) -> Floor:
    """Estimate the loss in nats per story that no model can beat on such stories; needs at least two."""
    nats = [-story.log_probability for story in sample]
    return Floor(fmean(nats), stdev(nats) / math.sqrt(len(nats)))


def _tell(choose: Callable[[Table[Any]], int]) -> Story:
    asks = book().asks
    chosen: dict[str, Option] = {}
    told: list[str] = []
    tags: Tags = frozenset()
    moment, log_probability = START, 0.0
    while moment != END:
        lines = line_table(moment, tags & asks[moment])
        number = choose(lines)
        log_probability += lines.log_probabilities[number]
        line = lines.options[number]
        told.append("\n" if line.paragraph else " ")
        tags |= line.gives
        for part in line.parts:
            if isinstance(part, str):
                told.append(part)
                continue
            if part.fresh:
                words = word_table(part.variable, tags & asks[part.variable])
                number = choose(words)
                log_probability += words.log_probabilities[number]
                chosen[part.variable] = words.options[number]
                tags |= words.options[number].gives
            told.append(part.render(chosen[part.variable]))
        moment = line.following
    return Story("".join(told).lstrip(), log_probability)
