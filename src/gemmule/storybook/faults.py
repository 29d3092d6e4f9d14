"""Stories with one planted fault that the checker finds: to be mended, or to be rejected in favor of the original."""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

from gemmule.storybook.check import World, check_story, read_story
from gemmule.storybook.grammar import PRONOUNS, Option, book
from gemmule.storybook.parser import NAMED


class Fault(NamedTuple):
    """A kind of fault: the story changed in one place, for a good story and its replay; None where it cannot be.

    `mendable`: the original is the only good story from which such a change leads here, since only a repetition of what
    the story said before was changed.
    """

    plant: Callable[[str, World, random.Random], Iterator[str]]
    mendable: bool


def plant_fault(story: str, kind: str, draw: random.Random) -> str | None:
    """Return a story with one fault of a kind, which `check_story` calls inconsistent; None where it has no place."""
    fault = FAULTS[kind]
    for changed in fault.plant(story, read_story(story), draw):
        verdict = check_story(changed)
        if not verdict.consistent and ((verdict.parses and verdict.ends) or not fault.mendable):
            return changed
    return None


def repetitions(story: str, text: str) -> Iterator[tuple[int, int]]:
    """Yield where a text stands again in a story, as a word after a space that no article belongs to."""
    found = [match.span() for match in re.finditer(rf"(?<![\w-]){re.escape(text)}(?![\w-])", story)]
    for start, stop in found[1:]:
        if story[start - 1] == " " and not re.search(r"\b[Aa]n? $", story[:start]):
            yield start, stop


def alternatives(option: Option, chosen: Mapping[str, Option], draw: random.Random) -> list[str]:
    """Return other texts for a choice, those that the story itself has chosen first."""
    kinds = [name for name, options in book().lexicons.items() if option in options]
    kinds = list(NAMED) if set(kinds) & set(NAMED) else kinds
    options = list(chain.from_iterable(book().lexicons[kind] for kind in kinds))
    shuffled = draw.sample(options, len(options))
    in_story = [other for other in shuffled if other in chosen.values()]
    return [other.text for other in dict.fromkeys([*in_story, *shuffled]) if other.text != option.text]


def _repeated(*variables: str) -> Callable[[str, World, random.Random], Iterator[str]]:
    """Return a fault that puts another entry of the lexicon where the story repeats its choice."""

    def plant(story: str, world: World, draw: random.Random) -> Iterator[str]:
        options = [world.chosen[variable] for variable in variables if variable in world.chosen]
        places = [(place, option) for option in options for place in repetitions(story, option.text)]
        for (start, stop), option in draw.sample(places, len(places)):
            yield story[:start] + alternatives(option, world.chosen, draw)[0] + story[stop:]

    return plant


def _pronoun(story: str, _world: World, draw: random.Random) -> Iterator[str]:
    """Turn a he into a she, a his into a her, or the reverse."""
    he, she = (list(PRONOUNS[name].values()) for name in ("he", "she"))
    swapped = dict(zip([*he, *she], [*she, *he], strict=True)) | {"her": "his"}
    found = list(re.finditer(rf"\b({'|'.join(swapped)})\b", story, re.IGNORECASE))
    for match in draw.sample(found, len(found)):
        word = swapped[match[0].lower()]
        yield story[: match.start()] + (word.capitalize() if match[0][0].isupper() else word) + story[match.end() :]


def _order(_story: str, world: World, draw: random.Random) -> Iterator[str]:
    """Let two neighboring lines change places."""
    lines = world.text
    for first in draw.sample(range(1, len(lines) - 1), len(lines) - 2):
        words = [lines[first + 1].strip(), lines[first].strip()]
        marks = [lines[first][0], lines[first + 1][0]]
        changed = [mark + text for mark, text in zip(marks, words, strict=True)]
        yield "".join([*lines[:first], *changed, *lines[first + 2 :]]).lstrip()


def _missing(_story: str, world: World, draw: random.Random) -> Iterator[str]:
    """Leave out one line between the first and the last."""
    lines = world.text
    for gone in draw.sample(range(1, len(lines) - 1), len(lines) - 2):
        yield "".join([*lines[:gone], *lines[gone + 1 :]]).lstrip()


# By name; a new one is one line.
FAULTS: dict[str, Fault] = {
    "name": Fault(_repeated("hero", "friend", "helper"), mendable=True),
    "thing": Fault(_repeated("noun"), mendable=True),
    "look": Fault(_repeated("look"), mendable=True),
    "pronoun": Fault(_pronoun, mendable=True),
    "order": Fault(_order, mendable=False),
    "missing": Fault(_missing, mendable=False),
}
# Never seen in training: the faults of the preferences for validation.
HELD_OUT_FAULTS = ("look",)
