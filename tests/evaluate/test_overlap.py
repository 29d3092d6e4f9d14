import random

import numpy as np
import pytest

from gemmule.data.encode import EncodedText
from gemmule.evaluate import overlap
from gemmule.evaluate.overlap import SPAN, Spans, TrainingText, longest_copied_spans, words_of
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


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_copied_span_is_found(seed: int) -> None:
    training = [sentence(30, 100 * seed + number) for number in range(12)]
    texts = [sentence(25, 1000 + seed), training[3], "x y", "", f"q {training[5][10:40]} z", sentence(20, seed, "xyz")]
    expected = [length if length >= 5 else 0 for length in (common_span(text, training) for text in texts)]
    assert longest_copied_spans(texts, [training[:7], training[7:]]) == expected
    assert expected[1] == 30
    assert max(expected[0], expected[4]) < 30


def test_no_span_reaches_from_one_document_into_the_next() -> None:
    one, other = sentence(10, 1, "abcdefgh"), sentence(10, 2, "abcdefgh")
    assert longest_copied_spans([f"{one} {other}"], [[one, other]]) == [10]


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words_of("“Don't,” said Émile; it's No. 7!") == ["don't", "said", "émile", "it's", "no", "7"]
    said = "Then they ALL went home, and the dog was glad."
    assert longest_copied_spans([said.lower().replace(",", " -")], [[said]]) == [10]


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
    spans = Spans()
    for text in texts:
        spans.add(text)
    assert spans.overlapping([training[:9], training[9:]]).tolist() == [True, False, False, False, True]
    assert spans.overlapping([]).tolist() == [False] * 5
    assert Spans().overlapping([training]).tolist() == []


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
