"""Tasks from any text: words that must occur, at most n sentences, an ending; made from a document, which solves it."""

import functools
import random
import re
import tomllib
from collections.abc import Mapping
from hashlib import blake2b
from importlib import resources
from typing import Any, NamedTuple

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# To a mark that no small letter follows: "Who is there?" asked the dog. is one.
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’)]*(?=\s+[^\sa-z]|\s*\Z)|\Z)", re.DOTALL)
_SHORTEST_WORD = 4
_MOST_WORDS, _LONGEST_ENDING = 3, 200
_HELD_OUT_WORDINGS = 2


class TextTask(NamedTuple):
    """An instruction, and what decides the right reply; the document it was made from is one."""

    instruction: str
    goal: Mapping[str, Any]


def make_text_task(text: str, held_out: bool = False) -> TextTask | None:
    """Make a task that a document solves, a pure function of it; None where it has no sentences or no words."""
    sentences = sentences_of(text)
    words = sorted({word.lower() for word in _WORD.findall(text) if len(word) >= _SHORTEST_WORD and word.islower()})
    if not sentences or not words:
        return None
    draw = random.Random(
        int.from_bytes(blake2b(text.encode(), digest_size=16, person=b"gemmule-texts").digest(), "big")
    )
    goal: dict[str, Any] = {"kind": "text"}
    rules = draw.sample(["words", "sentences", "ending"], draw.randint(1, 3))
    if "words" in rules:
        goal["words"] = draw.sample(words, min(len(words), draw.randint(1, _MOST_WORDS)))
    if "sentences" in rules:
        goal["sentences"] = len(sentences) + draw.randint(0, 2)
    if "ending" in rules and len(sentences[-1]) <= _LONGEST_ENDING:
        goal["ending"] = " ".join(sentences[-1].split())
    if len(goal) == 1:
        return None
    wordings = _texts()["wordings"]
    wording = wordings[draw.randrange(len(wordings) - (0 if held_out else _HELD_OUT_WORDINGS))]
    shown = {**goal, "words": ", ".join(goal.get("words", ()))}
    listed = " ".join(_texts()["rules"][rule].format(shown[rule]) for rule in rules if rule in goal)
    return TextTask(wording.format(rules=listed), goal)


def check_text(goal: Mapping[str, Any], reply: str) -> dict[str, bool]:
    """Return which rules of a task a reply keeps; white space is ignored, and an empty reply keeps none."""
    said, sentences = {word.lower() for word in _WORD.findall(reply)}, sentences_of(reply)
    found: dict[str, bool] = {}
    if "words" in goal:
        found["words"] = said >= set(goal["words"])
    if "sentences" in goal:
        found["sentences"] = 0 < len(sentences) <= goal["sentences"]
    if "ending" in goal:
        found["ending"] = " ".join(reply.split()).endswith(goal["ending"])
    return found


def sentences_of(text: str) -> list[str]:
    """Split a text into sentences, each to its closing mark and quotation mark."""
    return _SENTENCE.findall(text.strip())


@functools.cache
def _texts() -> Mapping[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath("text_tasks.toml").read_text(encoding="utf-8"))
