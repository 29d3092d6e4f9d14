import random

import numpy as np
import pytest

from gemmule.data.encode import EncodedText
from gemmule.evaluate import overlap
from gemmule.evaluate.overlap import (
    NGRAM,
    SPAN,
    Copied,
    CopiedSpans,
    Spans,
    TrainingText,
    Vocabulary,
    copied_spans,
    search,
    words_of,
)
from gemmule.evaluate.text import EncodedDocuments
from gemmule.tokenizer import Tokenizer
from sentences import SENTENCES


def sentence(length: int, seed: int, letters: str = "abc") -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(letters) for _ in range(length))


def common_span(text: str, training: list[str]) -> int:
    """The longest common span of words, the slow way."""
    words, best = words_of(text), 0
    for other in map(words_of, training):
        for at in range(len(words)):
            for there in range(len(other)):
                length = 0
                while words[at + length : at + length + 1] == other[there + length : there + length + 1] != []:
                    length += 1
                best = max(best, length)
    return best


def common_ngrams(text: str, training: list[str]) -> tuple[int, int]:
    """How many spans of 8 words a text has, and how many of them are in the training texts, the slow way."""
    words = words_of(text)
    ngrams = [" ".join(words[at : at + 8]) for at in range(len(words) - 7)]
    return len(ngrams), sum(any(f" {ngram} " in f" {other} " for other in training) for ngram in ngrams)


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_copied_span_is_found(seed: int) -> None:
    training = [sentence(30, 100 * seed + number) for number in range(12)]
    texts = [sentence(25, 1000 + seed), training[3], "x y", "", f"q {training[5][10:40]} z", sentence(20, seed, "xyz")]
    expected = [length if length >= 5 else 0 for length in (common_span(text, training) for text in texts)]
    found = copied_spans(texts, [training[:7], training[7:]])
    assert [each.longest for each in found] == expected
    for text, each in zip(texts, found, strict=True):
        span = " ".join(words_of(text)[each.start :][: each.longest])
        assert not span or any(f" {span} " in f" {other} " for other in training), "the span is where it is said to be"
        assert (each.ngrams, each.copied_ngrams) == common_ngrams(text, training)
    assert expected[1] == 30
    assert max(expected[0], expected[4]) < 30


def test_no_span_reaches_from_one_document_into_the_next() -> None:
    one, other = sentence(10, 1, "abcdefgh"), sentence(10, 2, "abcdefgh")
    (found,) = copied_spans([f"{one} {other}"], [[one, other]])
    assert (found.longest, found.ngrams, found.copied_ngrams) == (10, 13, 6)


def test_what_is_copied_is_counted_by_hand() -> None:
    text = "now the cat sat on the old mat near the door and slept all day"  # 15 words
    trained = "Once the cat sat on the old mat near the wall. And slept all day!"
    assert NGRAM == 8
    (found,) = copied_spans([text], [[trained]])
    assert found == Copied(ngrams=8, copied_ngrams=2, longest=9, start=1)
    assert copied_spans([text], [["the cat sat on the old mat"]]) == [Copied(8, 0, 7, 1)]
    assert copied_spans([text, "the cat sat on"], [["the cat sat on"]]) == [Copied(8, 0, 0, 0), Copied(0, 0, 0, 0)]
    assert copied_spans([], [[trained]]) == copied_spans([], []) == []


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words_of("“Don't,” said Émile; it's No. 7!") == ["don't", "said", "émile", "it's", "no", "7"]
    said = "Then they ALL went home, and the dog was glad."
    assert copied_spans([said.lower().replace(",", " -")], [[said]])[0].longest == 10


def test_documents_with_a_span_of_13_words_in_common_overlap() -> None:
    training = [sentence(40, number, "abcdefghij") for number in range(20)]
    words = training[7].split()
    texts = [
        " ".join(["new", *words[5 : 5 + SPAN], "end"]),
        " ".join(["new", *words[5 : 4 + SPAN], "end"]),
        sentence(40, 99, "abcdefghij"),
        "",
        training[19],
    ]
    vocabulary = Vocabulary()
    spans, none, copied = Spans(vocabulary), Spans(vocabulary), CopiedSpans(texts, vocabulary)
    for text in texts:
        spans.add(text)
    assert spans.overlapping().tolist() == [False] * 5
    search(iter([training[:9], training[9:]]), vocabulary, spans, none, copied)  # one pass for all
    assert spans.overlapping().tolist() == [True, False, False, False, True]
    assert none.overlapping().tolist() == []
    assert copied.found() == copied_spans(texts, [training])


def test_the_training_documents_are_read_as_text(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_tokenizer.encode_documents(SENTENCES[:9])
    corpus = EncodedDocuments([EncodedText(ids, 0, 0, True) for ids in rows])
    training = TrainingText(corpus, tiny_tokenizer)
    monkeypatch.setattr(overlap, "_BATCH", 4)
    seen: list[tuple[str, int, int | None]] = []
    assert [*training.read(lambda *step: seen.append(step))] == [SENTENCES[:4], SENTENCES[4:8], SENTENCES[8:9]]
    assert [done for _, done, _ in seen] == [4, 8, 9]
    assert training.share == 1
    monkeypatch.setattr(overlap, "_MOST_TOKENS", int(np.cumsum([len(row) for row in rows])[2]))
    assert [*training.read(lambda *_: None)] == [SENTENCES[:3]]
    assert training.share == 3 / 9
