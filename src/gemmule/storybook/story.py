"""Sampling stories: each a random walk through the grammar, deterministic in its seed, with its log-probability."""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from statistics import fmean, stdev
from typing import Any, NamedTuple

from gemmule.storybook.grammar import END, START, Option, Table, Tags, book, line_table, word_table


@dataclass(frozen=True)
class Story:
    """A story and the log-probability of exactly this text under the grammar, in nats."""

    text: str
    log_probability: float


class Floor(NamedTuple):
    """The entropy of the stories in nats per story, as the mean over a sample, and its standard error."""

    nats: float
    standard_error: float


def tell_story(seed: int, index: int) -> Story:
    """Sample story number `index` of the endless collection `seed`; the same on every machine and Python version."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=16).digest()
    draw = random.Random(int.from_bytes(digest, "big")).random
    return _sample(lambda table: bisect_right(table.cumulative, draw() * table.total))


def stories(count: int, seed: int, start: int = 0) -> Iterator[Story]:
    """Sample stories `start` to `start + count - 1` of the collection `seed`."""
    return (tell_story(seed, index) for index in range(start, start + count))


def entropy_floor(sample: Iterable[Story]) -> Floor:
    """Estimate the entropy in nats per story, the lower bound of any model's loss; needs at least two stories."""
    nats = [-story.log_probability for story in sample]
    return Floor(fmean(nats), stdev(nats) / math.sqrt(len(nats)))


def _sample(choose: Callable[[Table[Any]], int]) -> Story:
    asks = book().asks
    chosen: dict[str, Option] = {}
    texts: list[str] = []
    tags: Tags = frozenset()
    moment, log_probability = START, 0.0
    while moment != END:
        lines = line_table(moment, tags & asks[moment])
        number = choose(lines)
        log_probability += lines.log_probabilities[number]
        line = lines.options[number]
        texts.append("\n" if line.paragraph else " ")
        tags |= line.gives
        for part in line.parts:
            if isinstance(part, str):
                texts.append(part)
                continue
            if part.fresh:
                words = word_table(part.variable, tags & asks[part.variable])
                number = choose(words)
                log_probability += words.log_probabilities[number]
                chosen[part.variable] = words.options[number]
                tags |= words.options[number].gives
            texts.append(part.render(chosen[part.variable]))
        moment = line.following
    return Story("".join(texts).lstrip(), log_probability)
