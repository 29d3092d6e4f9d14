"""Checking stories: faults planted in good stories are found and named, and no text makes the checker fail."""

import math
import random
import re
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmule.storybook import Verdict, check_story, log_probability, stories, tell_story
from gemmule.storybook.grammar import book

Fault = Callable[[str, random.Random], str | None]

HERO = re.compile(r"(?:named|called|name was) ([A-Z]\w+)")
THING = re.compile(r"[Gg]ave (?:\w+ )?the (\w+) (\w+)[ .]")


def pick_other(lexicon: str, text: str, rng: random.Random) -> str:
    """Pick a one-word entry of a lexicon that the text does not contain."""
    entries = [option.text for option in book().lexicons[lexicon] if " " not in option.text]
    return rng.choice([entry for entry in entries if entry not in text])


def replace_one(text: str, word: str, other: str, rng: random.Random, first: int = 1) -> str | None:
    """Replace one occurrence of a word, but none of the first few."""
    places = list(re.finditer(rf"\b{word}\b", text))[first:]
    if not places:
        return None
    place = rng.choice(places)
    return text[: place.start()] + other + text[place.end() :]


def rename_the_hero(text: str, rng: random.Random) -> str | None:
    hero = HERO.search(text)
    return replace_one(text, hero[1], pick_other("hero", text, rng), rng) if hero else None


def flip_a_pronoun(text: str, rng: random.Random) -> str | None:
    before, after = rng.choice([("he", "she"), ("she", "he"), ("He", "She"), ("She", "He")])
    return replace_one(text, before, after, rng, first=0)


def recolor_the_thing(text: str, rng: random.Random) -> str | None:
    thing = re.search(r"the (\w+) (\w+) (?:was|to|in|from|back)\b", text)
    looks = {option.text for option in book().lexicons["look"]}
    if not thing or thing[1] not in looks or text.count(thing[1]) < 2:
        return None
    return replace_one(text, thing[1], pick_other("look", text, rng), rng)


def exchange_the_thing(text: str, rng: random.Random) -> str | None:
    nouns = {option.text for option in book().lexicons["noun"]}
    gifts = [word for word in re.findall(r"\bthe (\w+)", text) if word in nouns]
    return replace_one(text, gifts[0], pick_other("noun", text, rng), rng) if gifts else None


def move_the_place(text: str, rng: random.Random) -> str | None:
    places = [option.text for option in book().lexicons["place"] if text.count(option.text) > 1]
    return replace_one(text, places[0], rng.choice(["the moon", "the beach"]), rng) if places else None


def cut_the_ending(text: str, rng: random.Random) -> str | None:
    return text[: re.search(r'[^.!?]*[.!?]"?$', text).start()].rstrip()  # type: ignore[union-attr]


def cut_in_the_middle(text: str, rng: random.Random) -> str | None:
    return text[: rng.randrange(1, len(text) - 1)]


def swap_two_sentences(text: str, rng: random.Random) -> str | None:
    sentences = re.findall(r'[^.!?]+[.!?]+"?\s*', text)
    one, other = rng.sample(range(len(sentences)), 2)
    if sentences[one].strip() == sentences[other].strip():
        return None
    sentences[one], sentences[other] = sentences[other], sentences[one]
    return "".join(sentences)


def drop_a_sentence(text: str, rng: random.Random) -> str | None:
    sentences = re.findall(r'[^.!?]+[.!?]+"?\s*', text)
    del sentences[rng.randrange(len(sentences))]
    return "".join(sentences)


def exchange_giver_and_receiver(text: str, rng: random.Random) -> str | None:
    gift = re.search(r"\b([A-Z]\w+)( \w+ly)? gave the ((?:\w+ ){1,3})(back )?to ([A-Z]\w+)", text)
    if not gift:
        return None
    giver, how, thing, back, receiver = gift.groups(default="")
    return text[: gift.start()] + f"{receiver}{how} gave the {thing}{back}to {giver}" + text[gift.end() :]


def misspell_a_word(text: str, rng: random.Random) -> str | None:
    word = rng.choice(re.findall(r"\b[a-z]{4,}\b", text))
    return replace_one(text, word, word[0] + word[2:], rng, first=0)


def add_a_sentence(text: str, rng: random.Random) -> str | None:
    return text + " " + rng.choice(["The end.", "Then it rained.", "Once upon a time, there was a dog."])


# Each fault with words for it, the share of such faults that is found, and the share of those found in these words.
FAULTS: dict[Fault, tuple[str, float, float]] = {
    rename_the_hero: ("names change: ", 1, 1),
    flip_a_pronoun: (" used for ", 1, 0.95),
    recolor_the_thing: ("things change: ", 1, 0.95),
    exchange_the_thing: ("things change: ", 1, 0.95),
    move_the_place: ("", 1, 1),
    cut_the_ending: ("the story does not end", 1, 1),
    cut_in_the_middle: ("the story does not end", 1, 1),
    swap_two_sentences: ("", 0.99, 1),
    drop_a_sentence: ("", 0.99, 1),
    exchange_giver_and_receiver: (" gives the ", 1, 1),
    misspell_a_word: ("not from the book: ", 1, 1),
    add_a_sentence: ("goes on after its end", 1, 1),
}


def plant(fault: Fault, count: int) -> Iterator[tuple[str, Verdict]]:
    rng = random.Random(0)
    for story in stories(count, seed=21):
        faulty = fault(story.text, rng)
        if faulty is not None and faulty != story.text:
            yield faulty, check_story(faulty)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found_and_named(fault: Fault) -> None:
    words, least_found, least_named = FAULTS[fault]
    verdicts = [verdict for _, verdict in plant(fault, 300)]
    assert len(verdicts) > 20
    found = [verdict for verdict in verdicts if not verdict.consistent]
    assert len(found) >= least_found * len(verdicts)
    assert sum(any(words in problem for problem in verdict.problems) for verdict in found) >= least_named * len(found)


TOM = """\
Once upon a time, a kind boy named Tom lived in a small house on a hill. His best friend Kate was very funny. \
Tom and Kate did everything together. Tom had a red kite and took it everywhere.
One sunny day in May, Tom took the red kite to the park.
"May I hold the red kite now?" asked Kate. "No, it is mine!" cried Tom. Kate tugged, and Tom pulled too. \
Tom looked at the kite. It was no fun without Kate.
Tom went to Kate and said he was sorry. Tom gave the red kite to Kate. "Your turn," he said softly. \
Kate laughed, played with the kite, and gave it back to Tom. They took turns, and both of them were very happy.
From then on, they always took turns with the kite.
"""


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("Tom pulled", "Ben pulled", "names change: Tom became Ben"),
        ("Tom pulled", "Kate pulled", "Kate stands where Tom belongs"),
        (
            "Tom gave the red kite to Kate",
            "Kate gave the red kite to Tom",
            "Kate gives the red kite to Tom, but Tom has it",
        ),
        ("he was sorry", "she was sorry", "she used for Tom"),
        ("gave the red kite", "gave the blue kite", "things change: red became blue"),
        ("looked at the kite", "looked at the drum", "things change: kite became drum"),
        ("a kind boy named Tom", "a kind girl named Tom", "Tom is no name for this one: <Once upon a time,"),
        ("at the kite", "at teh kite", "not from the book: <Tom looked at teh kite.>"),
        (
            " Kate tugged, and Tom pulled too.",
            "",
            "out of order: <Tom looked at the kite. It was no fun without Kate.>",
        ),
        ("Kate tugged, and Tom pulled too.", "The end.", "the story goes on after its end: <Tom looked at the kite."),
        ("\nFrom then on, they always took turns with the kite.", "", "the story does not end"),
        (" His best friend Kate was very funny. Tom and Kate did everything together.", "", "Kate comes from nowhere"),
        (
            "From then on, they always took turns with the kite.",
            "Tom learned that it feels good to be honest.",
            "belongs to another story: <Tom learned that it feels good to be honest.>",
        ),
    ],
)
def test_each_kind_of_problem_has_its_words(before: str, after: str, problem: str) -> None:
    assert check_story(TOM).good, str(check_story(TOM))
    assert before in TOM
    verdict = check_story(TOM.replace(before, after))
    assert not verdict.consistent
    assert any(found.startswith(problem) for found in verdict.problems), verdict
    assert str(verdict).startswith("inconsistent: ")
    assert "\n" not in str(verdict)


def test_a_verdict_tells_what_is_missing() -> None:
    assert check_story("") == Verdict(False, False, False, ("there is no story",))
    unfinished = check_story(TOM[: TOM.index("From then on")])
    assert (unfinished.parses, unfinished.consistent, unfinished.ends) == (True, False, False)
    foreign = check_story(TOM.replace("Kate tugged, and Tom pulled too.", "It rained cats and dogs."))
    assert (foreign.parses, foreign.consistent, foreign.ends) == (False, False, True)
    assert foreign.problems == ("not from the book: <It rained cats and dogs.>",)


def test_what_follows_the_end_is_not_part_of_the_story() -> None:
    more = check_story(TOM + "The end.")
    assert (more.parses, more.consistent, more.ends) == (False, False, True)
    assert more.problems == ("the story goes on after its end: <The end.>",)


def test_what_is_odd_contradicts_nothing_but_is_never_told() -> None:
    odd = TOM.replace("red", "glass").strip()
    assert "glass kite" in odd
    assert check_story(odd).good
    assert log_probability(TOM.strip()) > log_probability(odd) == -math.inf


def test_white_space_does_not_matter() -> None:
    assert check_story(TOM.replace(" ", "\n\t ")).good


@given(st.text() | st.text(alphabet="\"'.!?,-aTA \n", min_size=50, max_size=400))
def test_no_text_makes_the_checker_fail(text: str) -> None:
    verdict = check_story(text)
    assert not verdict.consistent
    assert verdict.problems


@given(st.data())
def test_no_mixture_of_stories_makes_the_checker_fail(data: st.DataObject) -> None:
    texts = [tell_story(0, index).text for index in range(4)]
    pieces = [piece for text in texts for piece in re.split(r"(?<=[.!?,\" ])", text)]
    verdict = check_story("".join(data.draw(st.lists(st.sampled_from(pieces), max_size=60))))
    assert verdict.consistent <= (verdict.parses and verdict.ends)
    assert verdict.consistent == (not verdict.problems)


@pytest.mark.parametrize(
    "text",
    [
        '"' * 5000,
        '". ' * 190,
        "He was " * 80,
        "a-" * 100_000,
        "Once upon a time, there was a kind boy named Tom. " * 40,
        "word " * 1_000_000,
        '"Oh no! My ' * 50,
    ],
    ids=["quotes", "short sentences", "beginnings", "hyphens", "openings", "endless", "cries"],
)
def test_hostile_text_is_judged_quickly(text: str) -> None:
    check_story("warm up")
    started = time.process_time()
    assert not check_story(text).consistent
    assert time.process_time() - started < 1 + len(text) / 1e6


def test_a_story_is_checked_in_milliseconds() -> None:
    texts = [story.text for story in stories(200, seed=9)]
    check_story(texts[0])
    started = time.process_time()
    for text in texts:
        check_story(text)
    assert (time.process_time() - started) / len(texts) < 0.02
