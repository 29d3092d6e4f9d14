import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from gemmule.data.encode import EncodedText
from gemmule.data.packing import WholeDocuments
from gemmule.evaluate import log_probabilities as module
from gemmule.evaluate.log_probabilities import ContinuationScore, score_batches, score_continuations
from gemmule.evaluate.text import EncodedDocuments
from gemmule.model.gemma3 import Gemma3
from tiny import lively_model, tiny_config

LONGEST = 40


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return lively_model(tiny_config(max_position_embeddings=LONGEST))


def by_hand(model: Gemma3, ids: list[int], targets: int) -> tuple[list[float], list[bool]]:
    """Score the last `targets` ids, each from all before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0, -targets:].double()
    wanted = torch.tensor(ids[-targets:])
    scores = -functional.cross_entropy(logits, wanted, reduction="none")
    return scores.tolist(), (logits.argmax(-1) == wanted).tolist()


def greedily(model: Gemma3, ids: list[int], count: int) -> list[int]:
    """Return ids with the likeliest tokens after them."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def some_pairs(count: int, longest: int = 12) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(0)
    return [
        ([draw.randrange(48) for _ in range(draw.randint(1, longest))], [draw.randrange(48) for _ in range(number % 5)])
        for number in range(count)
    ]


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_continuations_are_scored_alike_in_batches_of_any_size(model: Gemma3, batch_tokens: int) -> None:
    pairs = some_pairs(30)
    for (context, continuation), found in zip(pairs, score_continuations(model, pairs, batch_tokens), strict=True):
        if not continuation:
            assert found == ContinuationScore(0.0, True)
            continue
        scores, _ = by_hand(model, context + continuation, len(continuation))
        assert found.log_probability == pytest.approx(sum(scores), abs=1e-5)


def test_a_greedy_continuation_is_known(model: Gemma3) -> None:
    ids = greedily(model, [3, 1, 4], 5)
    greedy, other = score_continuations(model, [(ids[:3], ids[3:]), (ids[:3], [*ids[3:-1], (ids[-1] + 1) % 48])])
    assert (greedy.is_greedy, other.is_greedy) == (True, False)


def test_of_pairs_too_long_for_the_model_the_first_context_is_left_out(model: Gemma3) -> None:
    ids = [number % 48 for number in range(LONGEST + 9)]
    (found,) = score_continuations(model, [(ids[:-3], ids[-3:])])
    scores, _ = by_hand(model, ids[-LONGEST - 1 :], 3)
    assert found.log_probability == pytest.approx(sum(scores), abs=1e-5)


def test_what_cannot_be_scored_is_refused(model: Gemma3) -> None:
    with pytest.raises(ValueError, match="pair 1 has an empty context"):
        score_continuations(model, [([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match="continuation of 41 tokens; the model reads 40"):
        score_continuations(model, [([1], [2] * 41)])
    assert score_continuations(model, []) == []


def documents(model: Gemma3, *lengths: int) -> EncodedDocuments:
    """Documents of random tokens, and one of likely ones."""
    draw = random.Random(1)
    rows = [[draw.randrange(48) for _ in range(length)] for length in lengths]
    rows.append(greedily(model, [3, 1, 4], 5))
    return EncodedDocuments([EncodedText(ids, len(ids), len(ids) - 1, True) for ids in rows])


@pytest.mark.parametrize("stride", [None, 3, 10])
@pytest.mark.parametrize("longest_row", [2048, 7])
def test_each_token_of_a_document_is_scored_once_from_its_window(
    model: Gemma3, stride: int | None, longest_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_ROW", longest_row)
    monkeypatch.setattr(module, "_CHUNK", 4)
    corpus = documents(model, 5, 38, 2, 11, 12, 1, 25)
    rows = WholeDocuments(corpus, 10, 2, 0, stride=stride)
    found: dict[int, dict[int, float]] = {}
    greedy: dict[tuple[int, int], bool] = {}
    for number, scores in enumerate(score_batches(model, rows)):
        ends = np.cumsum([piece.stop - piece.first for piece in rows.pieces(number)])
        assert ends[-1] == len(scores.log_probabilities)
        for piece, own, likeliest in zip(
            rows.pieces(number),
            np.split(scores.log_probabilities, ends),
            np.split(scores.likeliest, ends),
            strict=False,
        ):
            assert piece.first == 0 or stride is None or piece.first - piece.start >= 10 - stride
            ids = corpus.read(piece.document, piece.start, piece.stop + 1).tolist()
            expected, hits = by_hand(model, ids, len(own))
            assert own == pytest.approx(expected, abs=1e-5)
            places = range(piece.first, piece.stop)
            assert not set(places) & found.setdefault(piece.document, {}).keys()
            found[piece.document] |= dict(zip(places, own.tolist(), strict=True))
            greedy |= {(piece.document, place): hit for place, hit in zip(places, hits, strict=True)}
            assert likeliest.tolist() == hits
    lengths = {document: len(scores) for document, scores in found.items()}
    assert lengths == {0: 4, 1: 37, 2: 1, 3: 10, 4: 11, 6: 24, 7: 7}
    assert len(set(greedy.values())) == 2, "some are the likeliest, some are not"


def test_equally_likely_tokens_have_the_log_probability_of_their_number() -> None:
    model = lively_model(tiny_config(vocab_size=256))
    with torch.no_grad():
        model.embedding.weight.zero_()
    ((log_probability, _),) = score_continuations(model, [([1], list(range(30)))])
    assert log_probability == pytest.approx(-30 * math.log(256), rel=1e-7)
