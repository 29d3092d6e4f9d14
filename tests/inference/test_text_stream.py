import time
from itertools import chain

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from gemmule.errors import RecipeError
from gemmule.inference.text_stream import TextStream
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.training import train_tokenizer
from sentences import SENTENCES

TOKENIZER = train_tokenizer(SENTENCES, 380)
CRAB, ACCENT = "\U0001f980", "\u00e9"


def spell(*texts: str) -> list[int]:
    """Encode texts one by one, so that tokens end where they end."""
    return [token for text in texts for token in TOKENIZER.encode(text)[1:]]


def in_bytes(data: bytes) -> list[int]:
    return [6 + byte for byte in data]


def reply(ids: list[int], stops: list[str]) -> tuple[list[str], bool]:
    """Return what was shown at each token and at the end, and whether it was a stop string that ended it."""
    stream = TextStream(TOKENIZER, stops)
    shown = [stream.feed(token) for token in ids]
    return [*shown, stream.end()], stream.stopped


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut a text by the slow definition."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


SMALL_TEXTS = st.text(st.sampled_from(f"ab \n{ACCENT}{CRAB}\ufffd"), min_size=1, max_size=5)
BYTES = st.sampled_from([b"a", b"b", b"ab", b"\xc3", b"\xa9", b"\xf0\x9f", b"\xa6\x80", b"\xff", CRAB.encode()])
IDS = st.lists(
    SMALL_TEXTS.map(spell) | BYTES.map(in_bytes) | st.integers(0, 379).map(lambda token: [token]), max_size=12
).map(lambda parts: list(chain.from_iterable(parts)))


@given(IDS, st.lists(SMALL_TEXTS, max_size=4))
@example(spell("ab", "ab", "b"), ["abb", "bab"])
@example(spell("abc"), ["abc", "b"])
@example(spell("a", "b", "c"), ["abc", "b"])
@example(in_bytes(b"a\xc3"), ["\ufffd"])
def test_shown_text_is_the_whole_cut_at_the_first_stop_string(ids: list[int], stops: list[str]) -> None:
    shown, stopped = reply(ids, stops)
    assert ("".join(shown), stopped) == cut(TOKENIZER.decode(ids), stops)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=3, max_size=8), min_size=1, max_size=3))
@example("aaab", ["aab"])
@example("abaabab", ["abab"])
@example("aabaaabaaac", ["aabaaac"])
def test_stop_strings_that_begin_within_themselves_are_found(text: str, stops: list[str]) -> None:
    shown, stopped = reply(in_bytes(text.encode()), stops)
    assert ("".join(shown), stopped) == cut(text, stops)


@given(IDS, st.lists(SMALL_TEXTS, max_size=4), IDS)
def test_what_was_shown_stays_right_whatever_follows(ids: list[int], stops: list[str], others: list[int]) -> None:
    shown, stopped = reply(ids, stops)
    for following in ([], others):
        assert cut(TOKENIZER.decode(ids + following), stops)[0].startswith("".join(shown[:-1]))
    if not stopped:
        held = TOKENIZER.decode(ids)[len("".join(shown[:-1])) :].rstrip("\ufffd")
        assert not held or any(stop.startswith(held) for stop in stops), "no more is held back than must be"


@given(IDS, st.lists(SMALL_TEXTS, max_size=4))
def test_the_same_text_in_other_tokens_is_cut_at_the_same_place(ids: list[int], stops: list[str]) -> None:
    text = TOKENIZER.decode(ids)
    byte_by_byte, stopped = reply(in_bytes(text.encode()), stops)
    assert ("".join(byte_by_byte), stopped) == cut(text, stops)


@pytest.mark.parametrize(
    ("parts", "stops", "shown"),
    [
        (["once", " upon", " a", " time"], [], ["once", " upon", " a", " time", ""]),
        (["on", "ce"], ["\n\n"], ["on", "ce", ""]),
        (["on", "ce", "X", "fox"], ["ceX"], ["on", "", "", "", ""]),
        (["on", "ce", "X", "fox"], ["ceXX"], ["on", "", "", "ceXfox", ""]),
        (["\n", "\n", "\n"], ["\n\n\n\n"], ["", "", "", "\n\n\n"]),
        (["a", "b", "c"], ["ab", "abc"], ["", "", "", ""]),
        (["a", "b", "c"], ["bc", "abc"], ["", "", "", ""]),
        (["a", CRAB, "b"], [f"{CRAB}c"], ["a", "", f"{CRAB}b", ""]),
    ],
)
def test_text_comes_as_soon_as_it_is_certain(parts: list[str], stops: list[str], shown: list[str]) -> None:
    stream = TextStream(TOKENIZER, stops)
    by_part = ["".join(map(stream.feed, spell(part))) for part in parts]
    assert [*by_part, stream.end()] == shown


def test_a_stop_string_within_a_token_cuts_the_token() -> None:
    token = next(token for token in range(380) if TOKENIZER.piece(token) == b" time")
    assert reply([*in_bytes(b"a"), token, *in_bytes(b"b")], ["im"]) == (["a", " t", "", ""], True)


def test_special_tokens_have_no_text() -> None:
    assert reply([2, 4, *spell("a"), 5], ["b"])[0] == ["", "", "a", "", ""]


def test_bytes_that_never_become_text_are_replaced() -> None:
    assert reply(in_bytes(b"a\xff\xf0\x9fb\xf0"), [])[0] == ["a", "\ufffd", "", "", "\ufffdb", "", "\ufffd"]


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(TOKENIZER, ["b"])
    assert [stream.feed(token) for token in in_bytes(b"abc")] == ["a", "", ""]
    assert (stream.stopped, stream.end()) == (True, "")


def test_the_last_bytes_may_complete_a_stop_string() -> None:
    assert reply(in_bytes(b"ab\xc3"), ["b\ufffd"]) == (["a", "", "", ""], True)


def test_offsets_are_those_of_the_decoded_text() -> None:
    ids = [*spell("on"), *in_bytes(f"{CRAB}{ACCENT}".encode()), *spell(" fox")]
    stream = TextStream(TOKENIZER, ["fo"])
    for token in ids:
        stream.feed(token)
    sizes = [len(TOKENIZER.decode(ids[:count]).rstrip("\ufffd")) for count in range(len(ids))]
    assert stream.offsets == sizes


def test_decoders_that_look_at_neighbors_are_cut_too() -> None:
    library = Library(models.WordPiece({"[UNK]": 0, "to": 1, "##x": 2}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    stream = TextStream(Tokenizer(library.to_str(), {}), ["ox t"])
    assert [stream.feed(token) for token in (1, 1, 2, 1)] == ["t", "o t", "", ""]
    assert stream.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RecipeError, match='stop = ""'):
        TextStream(TOKENIZER, ["x", ""])


def test_long_stop_strings_take_linear_time() -> None:
    stops = ["a" * 9_999 + "b", "a" * 5_000 + "c", "ab" * 5_000, "a" * 10_000]
    began = time.process_time()
    ids = in_bytes(b"a" * 9_999 + b"x") * 3
    shown, stopped = reply(ids, stops)
    assert not stopped
    assert "".join(shown) == TOKENIZER.decode(ids)
    assert time.process_time() - began < 3  # minutes, were it quadratic
