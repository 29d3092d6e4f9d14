"""Telling stories: the same for ever, short enough for a row, none twice, each with its true probability."""

import hashlib
import math
from itertools import islice, pairwise

import pytest

from gemmule.storybook import check_story, log_probability, stories, tell_story


def test_the_first_stories_never_change() -> None:
    """A change of this hash changes every figure measured on the storybook."""
    digest = hashlib.sha256()
    for story in stories(1000, seed=0):
        digest.update(story.text.encode() + b"\0")
    assert digest.hexdigest() == "4f1ed228f684102bef58f845b5f6281496ae24bea3a230d8e98aca0285caf340"


def test_a_story_depends_on_nothing_but_seed_and_index() -> None:
    assert list(stories(3, seed=5, start=7)) == [tell_story(5, index) for index in (7, 8, 9)]
    assert list(islice(stories(10**12, seed=5, start=7), 1)) == [tell_story(5, 7)]
    assert tell_story(5, 7) != tell_story(7, 5)


def test_a_text_tells_the_probability_it_was_told_with() -> None:
    for story in stories(1500, seed=11):
        assert log_probability(story.text) == story.log_probability


def test_every_story_told_is_consistent() -> None:
    for story in stories(1500, seed=12):
        verdict = check_story(f"\n {story.text} \n")
        assert verdict.good, (story.text, str(verdict))
        assert str(verdict) == "consistent"


def test_a_text_that_is_never_told_has_no_probability() -> None:
    text = tell_story(0, 0).text
    for other in ("", " ", text + " ", text.replace("\n", " ", 1), text + " The end.", text[:-1]):
        assert log_probability(other) == -math.inf


def test_training_and_validation_share_no_story() -> None:
    train = [story.text for story in stories(20_000, seed=0)]
    validation = [story.text for story in stories(1_000, seed=1)]
    assert len(set(train)) == len(train)
    assert not set(train) & set(validation)


def test_stories_are_short_and_plain() -> None:
    for story in stories(10_000, seed=2):
        assert 80 <= len(story.text.split()) <= 190
        assert len(story.text) <= 1030
        assert story.text.isascii()
        assert "  " not in story.text
        assert "{" not in story.text
        assert story.text.count('"') % 2 == 0


@pytest.mark.parametrize("article", ["a", "an"])
def test_articles_fit_the_sound_that_follows(article: str) -> None:
    vowels = ("a", "e", "i", "o", "u", "honest")
    for story in stories(2000, seed=4):
        words = story.text.lower().replace('"', "").split()
        for word, after in pairwise(words):
            if word == article:
                assert after.startswith(vowels) == (article == "an"), (word, after)
