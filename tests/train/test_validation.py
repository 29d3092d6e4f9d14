import math

import pytest
import torch
from torch.nn import functional

from gemmule.data.corpus import Corpus
from gemmule.data.packing import WholeDocuments
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import Runtime
from gemmule.train.validation import Score, score
from tiny import lively_model, shallow_config

CPU = Runtime(torch.device("cpu"))
LONGEST = 20


def loss_by_hand(model: Gemma3, corpus: Corpus) -> float:
    """Predict each document alone, without padding, neighbours or chunks."""
    total = 0.0
    for document in range(corpus.documents):
        ids = torch.tensor(corpus.read(document, 0, LONGEST).astype("int64"))
        with torch.no_grad():
            logits = model(ids[None, :-1])
        total += functional.cross_entropy(logits[0], ids[1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("context", [LONGEST, 45])
def test_packing_leaks_nothing_and_loses_nothing(corpus: Corpus, context: int, batch_size: int) -> None:
    assert 12 < corpus.lengths.max() <= LONGEST, "longer than twice the window, not longer than a row"
    model = lively_model(shallow_config())
    documents = WholeDocuments(corpus, context, batch_size, pad_id=0)
    assert len(documents) < corpus.documents, "rows hold several documents"
    result = score(model, documents, documents.bytes, CPU)
    assert result.tokens == corpus.tokens - corpus.documents
    assert result.nats == pytest.approx(loss_by_hand(model, corpus), rel=1e-5)
    assert result.bytes == corpus.bytes


def test_a_limit_measures_the_first_documents(corpus: Corpus) -> None:
    model = lively_model(shallow_config())
    documents = WholeDocuments(corpus, LONGEST, 4, pad_id=0, limit_tokens=100)
    first = score(model, documents, documents.bytes, CPU)
    assert 100 <= first.tokens == documents.targets < corpus.tokens - corpus.documents
    assert first.bytes == sum(corpus.text_bytes(document) for document in range(documents.documents))


def test_validation_sees_the_model_without_dropout_and_leaves_it_as_it_was(corpus: Corpus) -> None:
    model = lively_model(shallow_config(dropout=0.5, attention_dropout=0.5))
    documents = WholeDocuments(corpus, LONGEST, 4, pad_id=0)
    for training in (True, False):
        model.train(training)
        first, second = (score(model, documents, documents.bytes, CPU) for _ in range(2))
        assert first == second
        assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_means_by_hand() -> None:
    # Four tokens at one bit each, of a text of 8 bytes: half a bit a byte, two equally likely tokens.
    result = Score(nats=4 * math.log(2), tokens=4, bytes=8)
    assert result.loss == pytest.approx(math.log(2))
    assert result.bits_per_byte == pytest.approx(0.5)
    assert result.perplexity == pytest.approx(2)
    assert result.figures() == {"loss": result.loss, "bits_per_byte": 0.5, "perplexity": result.perplexity}


def test_without_the_bytes_of_the_text_there_are_no_bits_per_byte() -> None:
    result = Score(nats=4.0, tokens=4, bytes=None)
    assert result.figures() == {"loss": 1.0, "bits_per_byte": None, "perplexity": math.e}


def test_perplexity_of_a_hopeless_model_is_a_number() -> None:
    assert math.isfinite(Score(nats=1e6, tokens=1, bytes=1).perplexity)
