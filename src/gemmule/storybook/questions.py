"""Test items made from stories: clozes with one choice that does not contradict the story, and questions with answers.

The checker judges: the right choice of a cloze adds no problem to the story so far, every other one does. Answers are
what the replay of the story knows. Items are deterministic in their seed.
"""

import random
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import count, islice
from typing import NamedTuple, TypeVar

from gemmule.storybook.check import World, check_story, read_story
from gemmule.storybook.faults import alternatives, repetitions
from gemmule.storybook.story import tell_story

CHOICES = 4
_UNFINISHED = ("the story does not end",)
_SENTENCE_END = re.compile(r'[.!?]"?(?=\s|$)')


class Cloze(NamedTuple):
    """A story up to a word that repeats an earlier choice, and sentences' ends of which one agrees with the story."""

    context: str
    choices: tuple[str, ...]  # CHOICES of them; a space belongs before each
    answer: int  # the index of the right one


class Question(NamedTuple):
    """A story, a question about it, and the answer in one or a few words."""

    story: str
    question: str
    answer: str


Item = TypeVar("Item", Cloze, Question)


def clozes(number: int, seed: int) -> list[Cloze]:
    """Make so many clozes, at most one from a story, from the stories of a seed."""
    return _take(number, seed, _cloze)


def questions(number: int, seed: int) -> list[Question]:
    """Make so many questions, at most one about a story, from the stories of a seed."""
    return _take(number, seed, _question)


def _take(number: int, seed: int, make: Callable[[str, random.Random], Item | None]) -> list[Item]:
    made = (make(tell_story(seed, index).text, _generator(seed, index)) for index in count())
    return list(islice((item for item in made if item is not None), number))


def _generator(seed: int, index: int) -> random.Random:
    """Return a generator of its own for each story, the same on every machine."""
    digest = blake2b(f"item:{seed}:{index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _cloze(story: str, draw: random.Random) -> Cloze | None:
    """Make a cloze of a story; None where it repeats nothing that could be contradicted."""
    chosen = read_story(story).chosen
    places = [(place, option) for option in chosen.values() for place in repetitions(story, option.text)]
    for (start, stop), option in draw.sample(places, len(places)):
        context, rest = story[: start - 1], story[stop : _sentence_end(story, stop)]
        right = option.text + rest
        if check_story(f"{context} {right}").problems != _UNFINISHED:  # the line goes on after this sentence
            continue
        others = (other + rest for other in alternatives(option, chosen, draw))
        wrong = (other for other in others if len(check_story(f"{context} {other}").problems) > 1)
        if len(distractors := list(islice(wrong, CHOICES - 1))) == CHOICES - 1:
            choices = draw.sample([right, *distractors], CHOICES)
            return Cloze(context, tuple(choices), choices.index(right))
    return None


def _sentence_end(story: str, start: int) -> int:
    match = _SENTENCE_END.search(story, start)
    return match.end() if match else len(story)


Ask = tuple[Sequence[str], str, Callable[[World], str]]

# What must have been chosen in the story; the question; its answer.
QUESTIONS: tuple[Ask, ...] = (
    (["hero"], "Who is the story about?", lambda world: world.chosen["hero"].text),
    (["hero", "kind"], "What is {hero}, a boy, a girl or which animal?", lambda world: world.chosen["kind"].text),
    (["hero", "friend"], "What is the name of {hero}'s friend?", lambda world: world.chosen["friend"].text),
    (["look", "noun"], "What is the {noun} like?", lambda world: world.chosen["look"].text),
    (["hero", "elder", "noun"], "Who gave {hero} the {noun}?", lambda world: world.chosen["elder"].text),
    (["noun", "place"], "Where did they go?", lambda world: world.chosen["place"].text),
    (["noun", "helper"], "What is the name of the helper?", lambda world: world.chosen["helper"].text),
    (["noun"], "Who has the {noun} in the end?", lambda world: world.holder.removeprefix("the ")),
)


def answers(world: World) -> list[tuple[str, str]]:
    """Return the questions that a story answers, with their answers."""
    texts = {name: option.text for name, option in world.chosen.items()}
    known = [(question, answer(world)) for needs, question, answer in QUESTIONS if texts.keys() >= set(needs)]
    return [(question.format_map(texts), answer) for question, answer in known if answer not in ("", "nobody")]


def _question(story: str, draw: random.Random) -> Question | None:
    """Ask one of the questions that a story answers."""
    answered = answers(read_story(story))
    return Question(story, *draw.choice(answered)) if answered else None
