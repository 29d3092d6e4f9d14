import pytest

from gemmule.evaluate.probes import distinct, names_closed, probe, quotes_closed, repeated_span
from gemmule.storybook import stories


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ('"Yes," she said. "No."', True),
        ('"Yes, she said.', False),
        ('"Yes,\nshe said."', False),
        ("“Yes,” she said, and “No.", False),
        ("“Yes,” she said.", True),
        ("It's fine", True),
        ("", True),
    ],
)
def test_quotation_marks_are_closed_in_their_paragraph(text: str, closed: bool) -> None:
    assert quotes_closed(text) == closed


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("There was a girl named Mia. She ran and ran. In the end Mia was glad.", True),
        ("There was a girl named Mia. She ran and ran. In the end Tom was glad.", False),
        ("Mia had a dog. One day the dog ran off, far away. At last it came back to Mia.", True),
        ('There was a girl named Mia. They ran all day long. Then "Yes," said Mia. "Good." They slept.', True),
        ("No name at all. Nobody came. Really.", True),
        ("", True),
    ],
)
def test_the_end_of_a_story_brings_no_new_name(text: str, closed: bool) -> None:
    assert names_closed(text) == closed


def test_the_longest_span_that_occurs_again() -> None:
    assert repeated_span(["the", "cat", "saw", "the", "dog", "and", "the", "cat", "saw", "me"]) == 3
    assert repeated_span(["ha"] * 5) == 4
    assert repeated_span(["once"]) == repeated_span([]) == 0


def test_variety_is_the_share_of_different_spans() -> None:
    assert distinct([["a", "b", "a"]], 1) == pytest.approx(2 / 3)
    assert distinct([["a", "b"], ["a", "b"]], 2) == 0.5, "spans do not reach from one text into the next"
    assert distinct([["a"]], 2) is None


def test_an_empty_text_has_no_words() -> None:
    assert probe("")[:4] == (0, None, None, 0)


def test_the_storybooks_own_stories_are_found_sound() -> None:
    found = [probe(story.text) for story in stories(100, seed=3)]
    assert all(each.quotes_closed for each in found)
    assert sum(each.names_closed for each in found) >= 80
    assert max(each.repeated_span for each in found) < 20
