from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmule.data.clean import KeySet, clean_documents, repair_mojibake, text_key
from gemmule.data.readers import Document


def clean(*texts: str | bytes | Document, withheld: tuple[str, ...] = ()) -> tuple[list[str], dict[str, int]]:
    documents = [text if isinstance(text, Document) else Document(text) for text in texts]
    tally: Counter[str] = Counter()
    kept_back = KeySet()
    for text in withheld:
        kept_back.add(text_key(text))
    kept = [document.text for document in clean_documents(documents, tally, KeySet(), kept_back)]
    return kept, {reason: count for reason, count in tally.items() if count}


def mangled(text: str) -> str:
    """Read UTF-8 as Windows does, undefined bytes as themselves."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())


def test_each_reason_is_counted_once() -> None:
    kept, tally = clean("one", b"\xff", "\ud800", "  \n", "", "two", "one", "three", withheld=("three",))
    assert kept == ["one", "two"]
    assert tally == {"read": 8, "not_utf8": 2, "empty": 2, "duplicate": 1, "shared": 1}


def test_duplicates_are_told_by_their_words_alone() -> None:
    assert clean("a b\nc", "a  b c", "a bc", "A b c")[0] == ["a b\nc", "a bc", "A b c"]


def test_space_around_goes_and_space_within_stays() -> None:
    assert clean("\n  a\t b \n\nc  \n")[0] == ["a\t b \n\nc"]


def test_line_ends_become_newlines() -> None:
    assert clean("a\r\nb\r\n\r\nc\rd")[0] == ["a\nb\n\nc\rd"]


@pytest.mark.parametrize("text", ["\u201cYes,\u201d she said.", "caf\u00e9", "It\u2019s \U0001f984", "\u4f60\u597d"])
def test_mojibake_is_repaired(text: str) -> None:
    assert mangled(text) != text
    assert clean(mangled(text)) == ([text], {"read": 1, "repaired": 1})


@pytest.mark.parametrize(
    "text", ["plain", "caf\u00e9", "\u201cYes\u201d", "na\u00efve \u00c3 \u4f60", "\u00c3o", "NÃO"]
)
def test_what_is_right_is_not_repaired(text: str) -> None:
    assert clean(text) == ([text], {"read": 1})


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_repair_undoes_exactly_what_was_done(text: str) -> None:
    assert repair_mojibake(mangled(text)) == text


def test_text_of_known_probability_stays_as_it_is() -> None:
    story = Document("  " + mangled("caf\u00e9") + "\r\n", -3.0)
    kept, tally = clean(story, story)
    assert kept == [story.text] * 2
    assert tally == {"read": 2}


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3) | st.integers(0, 40).map(lambda n: n << 32)))
def test_key_set_is_a_set(keys: list[int]) -> None:
    ours, theirs = KeySet(), set[int]()
    for key in keys:
        # Zero marks an empty slot, so the set takes zero and one for the same key.
        assert ours.add(key) == ((key or 1) not in theirs)
        theirs.add(key or 1)
        assert key in ours
    assert len(ours) == len(theirs)


def test_key_set_grows_and_forgets_nothing() -> None:
    keys = [text_key(str(number)) for number in range(20_000)]
    known = KeySet()
    assert all(known.add(key) for key in keys)
    assert not any(known.add(key) for key in keys)
    assert text_key("another") not in known
