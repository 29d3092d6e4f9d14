import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from corpora import write_corpus
from hypothesis import given
from hypothesis import strategies as st

from gemmule.data.batches import IGNORED, PADDING, Batch
from gemmule.data.corpus import Corpus
from gemmule.data.packing import PackedRows, WholeDocuments
from gemmule.errors import DatasetError

BOS, EOS = 2, 1


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents of which no two tokens are the same, between bos and eos."""
    ids = iter(range(10, 1000))
    return [[BOS, *(next(ids) for _ in range(length)), EOS] for length in lengths]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        yield Path(folder)


def corpus_of(documents: list[list[int]], folders: Path) -> Corpus:
    return write_corpus(Path(tempfile.mkdtemp(dir=folders)), documents, largest=20)


corpora = st.lists(st.integers(0, 9), min_size=2, max_size=8).map(numbered)


def stream_of(rows: PackedRows, length: int) -> list[int]:
    """Join the inputs of consecutive rows, fetched in uneven portions."""
    ids: list[int] = []
    first = 0
    for count in (1, 2, 3) * length:
        if len(ids) >= length:
            break
        ids += rows.rows(first, count).tokens.flatten().tolist()
        first += count
    return ids[:length]


def split(stream: list[int]) -> list[list[int]]:
    starts = [place for place, token in enumerate(stream) if token == BOS]
    return [stream[start:stop] for start, stop in pairwise([*starts, len(stream)])]


@given(documents=corpora, context=st.integers(1, 7), seed=st.integers(0, 3))
def test_each_epoch_holds_every_document_once(
    folders: Path, documents: list[list[int]], context: int, seed: int
) -> None:
    corpus = corpus_of(documents, folders)
    if corpus.tokens <= context:
        return
    stream = stream_of(PackedRows(corpus, context, seed), 4 * corpus.tokens)
    for epoch in range(4):
        once = stream[epoch * corpus.tokens : (epoch + 1) * corpus.tokens]
        assert sorted(split(once)) == sorted(documents)


@given(documents=corpora, context=st.integers(1, 7), masked=st.booleans())
def test_every_token_but_the_first_of_a_document_is_a_target_once(
    folders: Path, documents: list[list[int]], context: int, masked: bool
) -> None:
    corpus = corpus_of(documents, folders)
    if corpus.tokens <= context:
        return
    epochs = context  # so many epochs are a whole number of rows
    rows = PackedRows(corpus, context, 0, masked, BOS).rows(0, corpus.tokens)
    targets = Counter(rows.targets.flatten().tolist())
    ignored = targets.pop(IGNORED)
    # The stream's very first token is the target of no row; the last row's last target opens the next epoch.
    assert ignored == epochs * len(documents)
    assert targets == Counter(token for document in documents for token in document[1:] for _ in range(epochs))
    assert rows.num_targets == targets.total()


@given(documents=corpora, context=st.integers(1, 7), first=st.integers(0, 30), count=st.integers(1, 5))
def test_rows_are_a_pure_function_of_their_number(
    folders: Path, documents: list[list[int]], context: int, first: int, count: int
) -> None:
    corpus = corpus_of(documents, folders)
    if corpus.tokens <= context:
        return
    used = PackedRows(corpus, context, 5, True, BOS)
    used.rows(3, 4)
    together = used.rows(first, count)
    for row in range(count):
        alone = PackedRows(corpus, context, 5, True, BOS).rows(first + row, 1)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.targets[0], together.targets[row])


def test_targets_are_the_next_inputs(folders: Path) -> None:
    corpus = corpus_of(numbered([5, 3, 8, 1]), folders)
    batch = PackedRows(corpus, 4, 0).rows(0, 10)
    stream = batch.tokens.flatten()
    assert batch.targets.flatten()[:-1].tolist() == stream[1:].tolist()
    assert batch.documents is None
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)


def test_batches_split_into_portions_of_rows(folders: Path) -> None:
    batch = PackedRows(corpus_of(numbered([5, 3, 8, 1]), folders), 4, 0, True, BOS).rows(0, 5)
    batch = batch._replace(inputs={"reference": torch.randn(5, 2)})
    portions = list(batch.split(2))
    assert [len(portion.tokens) for portion in portions] == [2, 2, 1]
    whole = batch.to(torch.device("cpu"))
    for name in ("tokens", "targets", "documents"):
        assert torch.equal(torch.cat([getattr(part, name) for part in portions]), getattr(whole, name))
    assert torch.equal(torch.cat([part.inputs["reference"] for part in portions]), whole.inputs["reference"])
    assert sum(portion.num_targets for portion in portions) == batch.num_targets


def test_only_what_something_before_predicts_is_trained(folders: Path) -> None:
    documents = [[10, 11, 12, EOS], [20, 21, 22, EOS]]  # a vocabulary without bos
    corpus = corpus_of(documents, folders)
    assert PackedRows(corpus, 8 - 1, 0).rows(0, 8).num_targets == 56
    masked = PackedRows(corpus, 8 - 1, 0, mask_documents=True).rows(0, 8)
    assert not set(masked.targets.flatten().tolist()) & {10, 20}


@given(documents=corpora, context=st.integers(2, 7))
def test_masked_documents_are_significant_within_a_row(folders: Path, documents: list[list[int]], context: int) -> None:
    corpus = corpus_of(documents, folders)
    if corpus.tokens <= context:
        return
    batch = PackedRows(corpus, context, 0, True, BOS).rows(0, 6)
    assert batch.documents is not None
    assert batch.documents.dtype == torch.int32
    for tokens, owners in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
        for place in range(1, context):
            assert (owners[place] != owners[place - 1]) == (tokens[place] == BOS)


def test_epochs_and_seeds_are_shuffled_differently(folders: Path) -> None:
    corpus = corpus_of(numbered([3] * 20), folders)
    orders = [PackedRows(corpus, 4, seed).epoch(epoch).order.tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_order_is_the_same_on_every_version_of_numpy(folders: Path) -> None:
    corpus = corpus_of(numbered([3] * 8), folders)
    assert PackedRows(corpus, 4, 7).epoch(1).order.tolist() == [1, 3, 2, 7, 4, 5, 0, 6]


def test_rows_refuse_a_corpus_shorter_than_one(folders: Path) -> None:
    with pytest.raises(DatasetError, match=r"train\.context = 64"):
        PackedRows(corpus_of(numbered([3, 3]), folders), 64, 0)


def test_a_batch_of_64_rows_takes_milliseconds(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [[BOS, *range(10, 210), EOS]] * 2000)
    rows = PackedRows(corpus, 256, 0, True, BOS)
    rows.rows(0, 64)
    best = min(_seconds(rows, first) for first in range(64, 64 * 20, 64))
    assert best < 0.02


def _seconds(rows: PackedRows, first: int) -> float:
    start = time.perf_counter()
    rows.rows(first, 64)
    return time.perf_counter() - start


def pieces_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Return (inputs, targets) of each document of each row."""
    assert batch.documents is not None
    found = []
    for tokens, targets, owners in zip(batch.tokens, batch.targets, batch.documents, strict=True):
        for owner in owners.unique().tolist():
            if owner == PADDING:
                assert set(targets[owners == owner].tolist()) <= {IGNORED}
            else:
                found.append((tokens[owners == owner].tolist(), targets[owners == owner].tolist()))
    return found


@given(documents=corpora, context=st.integers(1, 12), batch_size=st.integers(1, 4))
def test_validation_sees_each_document_whole_and_once(
    folders: Path, documents: list[list[int]], context: int, batch_size: int
) -> None:
    validation = WholeDocuments(corpus_of(documents, folders), context, batch_size, 0)
    batches = list(validation)
    assert len(batches) == len(validation)
    assert all(batch.tokens.shape == (len(batch.tokens), context) for batch in batches)
    expected = [
        (document[start : start + context][: len(document) - 1 - start], document[start + 1 : start + context + 1])
        for document in documents
        for start in range(0, len(document) - 1, context)
    ]
    assert sorted(piece for batch in batches for piece in pieces_of(batch)) == sorted(expected)
    assert validation.targets == sum(batch.num_targets for batch in batches) == sum(len(d) - 1 for d in documents)


@given(documents=corpora, context=st.integers(1, 12), data=st.data())
def test_windows_that_overlap_score_each_token_once_with_enough_context(
    folders: Path, documents: list[list[int]], context: int, data: st.DataObject
) -> None:
    stride, longer = data.draw(st.integers(1, context)), data.draw(st.integers(0, 9))
    corpus = corpus_of(documents, folders)
    validation = WholeDocuments(corpus, context, 3, 0, stride=stride, row_length=context + longer)
    scored: list[tuple[int, int]] = []
    for number, batch in enumerate(validation):
        pieces = validation.pieces(number)
        assert batch.num_targets == sum(piece.stop - piece.first for piece in pieces)
        targets = iter(batch.targets[batch.targets != IGNORED].tolist())
        for document, start, first, stop in pieces:
            assert stop - start <= context
            assert first == 0 or first - start >= context - stride
            assert [next(targets) for _ in range(first, stop)] == documents[document][first + 1 : stop + 1]
            scored += [(document, place) for place in range(first, stop)]
    assert sorted(scored) == [(n, place) for n, ids in enumerate(documents) for place in range(len(ids) - 1)]


@given(documents=corpora, limit=st.integers(1, 100))
def test_validation_takes_the_first_documents_up_to_the_limit(
    folders: Path, documents: list[list[int]], limit: int
) -> None:
    corpus = corpus_of(documents, folders)
    validation = WholeDocuments(corpus, 5, 2, 0, limit)
    taken = documents[: validation.documents]
    assert validation.targets == sum(len(document) - 1 for document in taken)
    assert validation.bytes == sum(map(len, taken))
    assert validation.targets >= min(limit, corpus.tokens - corpus.documents)
    assert validation.targets - (len(taken[-1]) - 1) < limit


def test_validation_packs_tightly(folders: Path) -> None:
    corpus = corpus_of(numbered([3, 3, 3, 3, 3, 3, 3, 3]), folders)  # four inputs each
    assert sum(len(batch.tokens) for batch in WholeDocuments(corpus, 16, 4, 0)) == 2


def test_validation_is_the_same_each_time(folders: Path) -> None:
    validation = WholeDocuments(corpus_of(numbered([4, 2, 7, 30]), folders), 8, 2, 0)
    for first, second in zip(validation, validation, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
