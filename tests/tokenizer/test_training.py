import re
import time

import pytest
from awkward_text import sentences
from hypothesis import given
from hypothesis import strategies as st

from gemmule.errors import RecipeError, TokenizerError
from gemmule.settings import check_recipe
from gemmule.tokenizer import Tokenizer, TokenizerSettings, training
from gemmule.tokenizer.training import BYTES, FIRST_PIECE, SPECIALS, train_tokenizer


def test_ids_follow_gemma(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (4, 5)
    assert tokenizer.encode("\x00")[1:] == [len(SPECIALS)]
    assert FIRST_PIECE == 262
    assert BYTES[0x41] == "<0x41>"


def test_vocabulary_has_exactly_the_size_asked_for() -> None:
    for size in (330, 401, 512):
        assert train_tokenizer(sentences(300, seed=2), size).vocab_size == size


def test_training_twice_gives_the_same_tokenizer() -> None:
    first, second = (train_tokenizer(sentences(100, seed=3), 400) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_digits_are_split_and_spaces_join_the_next_word(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the 345 fox")[1:]
    assert [tokenizer.decode([token]) for token in ids] == ["the", " ", "3", "4", "5", " fox"]


def test_runs_of_newlines_become_one_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n\n")) == 2  # bos and one more


def test_word_mark_never_enters_the_vocabulary() -> None:
    tokenizer = train_tokenizer(["\u2581the fox " * 50 + text for text in sentences(100, seed=4)], 400)
    assert "\u2581" not in "".join(tokenizer.decode([token]) for token in range(FIRST_PIECE, 400))
    assert len(tokenizer.encode("\u2581")[1:]) == 3


def test_rare_characters_are_spelt_in_bytes() -> None:
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    tokenizer = train_tokenizer([*sentences(300, seed=5), rare], 400)
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode(tokenizer.encode(rare)) == rare


def test_pieces_never_join_neighbours_of_a_dropped_character() -> None:
    documents = ["ab" + chr(0x4E00 + n) + "cd" for n in range(500)] * 2 + ["xy" * 20]
    tokenizer = train_tokenizer(documents, 340)
    assert "abcd" not in [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]


def test_vocabulary_beyond_the_corpus_names_the_largest_that_works() -> None:
    documents = sentences(20, seed=6)
    with pytest.raises(TokenizerError, match=r"tokenizer\.vocab_size = 50000: .* use (\d+) or less") as caught:
        train_tokenizer(documents, 50_000)
    largest = int(str(caught.value).split("use ")[1].split()[0])
    assert train_tokenizer(documents, largest).vocab_size == largest
    with pytest.raises(TokenizerError, match=f"use {largest} or less"):
        train_tokenizer(documents, largest + 1)


def test_vocabulary_too_small_names_the_smallest_that_works() -> None:
    documents = sentences(20, seed=7)
    with pytest.raises(TokenizerError, match=r"tokenizer\.vocab_size = 270: too small") as caught:
        train_tokenizer(documents, 270)
    smallest = int(str(caught.value).split("use ")[1].split()[0])
    assert train_tokenizer(documents, smallest).vocab_size == smallest


def test_recipe_refuses_a_vocabulary_without_room_for_bytes() -> None:
    with pytest.raises(RecipeError, match="vocab_size = 200: too small"):
        check_recipe({"vocab_size": 200}, TokenizerSettings, "here")


def merge_like_sentencepiece(text: str, ranks: dict[str, int]) -> list[str]:
    """Merge whichever neighbours make the best-ranked piece, leftmost first, blind to boundaries: llama.cpp's rule."""
    symbols = list(text)
    while True:
        unions = [
            (ranks[pair], place)
            for place in range(len(symbols) - 1)
            if (pair := symbols[place] + symbols[place + 1]) in ranks
        ]
        if not unions:
            return symbols
        place = min(unions)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def spelt(symbols: list[str], ranks: dict[str, int]) -> list[int]:
    first_byte = len(SPECIALS)
    return [
        token
        for symbol in symbols
        for token in ([ranks[symbol]] if symbol in ranks else [first_byte + byte for byte in symbol.encode()])
    ]


@given(st.data())
def test_a_tokenizer_that_knows_only_the_vocabulary_agrees(
    tokenizer: Tokenizer, texts: st.SearchStrategy[str], data: st.DataObject
) -> None:
    text = data.draw(texts)
    ranks = {tokenizer.decode([token]): token for token in range(FIRST_PIECE, tokenizer.vocab_size)}
    assert tokenizer.encode(text)[1:] == spelt(merge_like_sentencepiece(text, ranks), ranks)


def test_it_agrees_on_running_text(tokenizer: Tokenizer) -> None:
    ranks = {tokenizer.decode([token]): token for token in range(FIRST_PIECE, tokenizer.vocab_size)}
    for text in sentences(50, seed=8):
        assert tokenizer.encode(text)[1:] == spelt(merge_like_sentencepiece(text, ranks), ranks)


@pytest.mark.parametrize("run", ["x", "ab", "-", "-=", " ", "\n", "\u0e01\u0e02", "\u4f60\u597d"])
def test_long_runs_of_one_class_take_no_longer_than_other_text(run: str) -> None:
    began = time.monotonic()
    tokenizer = train_tokenizer([*sentences(100, seed=9), run * (300_000 // len(run))], 340)
    assert time.monotonic() - began < 10  # 40 seconds, were it quadratic
    assert tokenizer.vocab_size == 340


def test_runs_that_text_has_are_learned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [*sentences(200, seed=10), *[f"{'-' * 120} {'Donau' * 20} {'x' * 500}\n\n"] * 5]
    cut = train_tokenizer(documents, 420)
    monkeypatch.setattr(training, "_LONG", re.compile("(?!)"))
    assert train_tokenizer(documents, 420).fingerprint == cut.fingerprint
    assert train_tokenizer([*documents, "x" * 600], 420).vocab_size == 420


@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_no_text_at_all_is_a_clear_error(documents: list[str]) -> None:
    with pytest.raises(TokenizerError, match="vocab_size"):
        train_tokenizer(documents, 512)


def test_a_vocabulary_of_at_most_so_many_entries_is_the_largest_that_the_text_allows() -> None:
    documents = ["Roses are red, violets are blue."] * 5
    largest = train_tokenizer(documents, 5000, at_most=True)
    assert largest.vocab_size < 5000
    assert train_tokenizer(documents, largest.vocab_size).fingerprint == largest.fingerprint
    with pytest.raises(TokenizerError, match="more than this corpus allows"):
        train_tokenizer(documents, largest.vocab_size + 1)
