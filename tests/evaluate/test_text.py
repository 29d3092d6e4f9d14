import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from gemmule.data import DataSettings
from gemmule.errors import SourceError
from gemmule.evaluate.text import score_text
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from sentences import SENTENCES
from tiny import lively_model, tiny_config


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return lively_model(tiny_config(vocab_size=380, max_position_embeddings=256))


@pytest.fixture
def text(tmp_path: Path) -> DataSettings:
    """Documents of uneven length, one of them blank, spaced so that only stripping makes them what they are."""
    documents = [" ".join(SENTENCES[: 1 + number % 3]) for number in range(9)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join([*documents[:4], "  ", *documents[4:]]) + "\n")
    return DataSettings(train=str(tmp_path / "text.txt"))


def documents_of(settings: DataSettings) -> list[str]:
    texts = Path(settings.train[0]).read_text().split(settings.separator)
    return [text.strip() for text in texts if text.strip()]


def nats_by_hand(model: Gemma3, ids: list[int]) -> float:
    """Predict every id but the first from all before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))
    return functional.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="sum").item()


def test_each_document_is_predicted_alone_from_bos_to_eos(
    model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings
) -> None:
    rows = tiny_tokenizer.encode_documents(documents_of(text))
    figures = score_text(model, tiny_tokenizer, text, batch_size=3)
    nats = sum(nats_by_hand(model, ids) for ids in rows)
    tokens, size = sum(len(ids) - 1 for ids in rows), sum(len(each.encode()) for each in documents_of(text))
    assert (figures["documents"], figures["tokens"], figures["bytes"]) == (9, tokens, size)
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_longer_documents_are_cut_and_every_token_still_counts(
    model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings
) -> None:
    rows = tiny_tokenizer.encode_documents(documents_of(text))
    figures = score_text(model, tiny_tokenizer, text, context=10)
    pieces = [ids[start : start + 11] for ids in rows for start in range(0, len(ids) - 1, 10)]
    assert figures["tokens"] == sum(len(ids) - 1 for ids in rows)
    expected = sum(nats_by_hand(model, piece) for piece in pieces) / figures["tokens"]
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_a_context_the_model_is_not_asked_beyond_its_reach(
    tiny_tokenizer: Tokenizer, text: DataSettings
) -> None:
    short = lively_model(tiny_config(vocab_size=380, max_position_embeddings=16))
    assert score_text(short, tiny_tokenizer, text) == pytest.approx(score_text(short, tiny_tokenizer, text, context=16))


def test_a_whole_book_is_cut_before_it_takes_all_memory(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text("\n".join(SENTENCES * 2))
    book = DataSettings(train=str(tmp_path / "book.txt"))
    model = lively_model(tiny_config(vocab_size=380, max_position_embeddings=100_000))
    lengths: set[int] = set()

    def watch(_module: Gemma3, arguments: tuple[torch.Tensor, ...]) -> None:
        lengths.add(arguments[0].shape[1])

    model.register_forward_pre_hook(watch)
    tokens = len(tiny_tokenizer.encode_documents([(tmp_path / "book.txt").read_text()])[0])
    assert score_text(model, tiny_tokenizer, book)["tokens"] == tokens - 1 > 2048
    assert lengths == {2048}


def test_the_first_documents_are_taken(model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings) -> None:
    figures = score_text(model, tiny_tokenizer, text, documents=2)
    assert figures["documents"] == 2
    assert figures["bytes"] == sum(len(each.encode()) for each in documents_of(text)[:2])


def test_progress_is_told_by_the_batch(model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings) -> None:
    told: list[tuple[str, int, int | None]] = []
    score_text(model, tiny_tokenizer, text, batch_size=2, progress=lambda *step: told.append(step))
    assert told == [("predicting", number, len(told)) for number in range(len(told))]
    assert len(told) > 1


def test_a_document_that_is_not_utf8_is_refused(model: Gemma3, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"good\n<|endoftext|>\nb\xe4d\n")
    with pytest.raises(SourceError, match=r"text\.txt: a document is not UTF-8; `gemmule prepare` would leave it out"):
        score_text(model, tiny_tokenizer, DataSettings(train=str(tmp_path / "text.txt")))
