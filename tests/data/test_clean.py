from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmule.data.clean import clean_document, repair_mojibake, text_key
from gemmule.data.readers import Document
from gemmule.data.settings import DataSettings


def clean(*texts: str | bytes | Document, **settings: object) -> tuple[list[str], dict[str, int]]:
    documents = [text if isinstance(text, Document) else Document(text) for text in texts]
    tally: Counter[str] = Counter()
    chosen = DataSettings.model_validate({"train": "unused", **settings})
    kept = [made.text for document in documents if (made := clean_document(document, chosen, tally))]
    return kept, {reason: count for reason, count in tally.items() if count}


def mangled(text: str) -> str:
    """Read UTF-8 as Windows does, undefined bytes as themselves."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())


def test_each_reason_is_counted_once() -> None:
    kept, tally = clean("one", b"\xff", "\ud800", "  \n", "", "two", min_characters=2)
    assert kept == ["one", "two"]
    assert tally == {"read": 6, "not_utf8": 2, "empty": 2}


def test_texts_are_significant_by_their_words_alone() -> None:
    assert text_key("a b\nc") == text_key(" a  b c") == text_key("a\tb c\n")
    assert len({text_key(text) for text in ("a b c", "a bc", "A b c")}) == 3


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
    kept, tally = clean(story, story, min_characters=1000, quality=True)
    assert kept == [story.text] * 2
    assert tally == {"read": 2}
