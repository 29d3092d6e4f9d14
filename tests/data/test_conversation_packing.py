"""Rows of whole conversations: each once an epoch, alone, with the trained tokens as targets."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import FINGERPRINT
from hypothesis import given
from hypothesis import strategies as st

from gemmule.data.batches import IGNORED, PADDING
from gemmule.data.conversation_packing import PackedConversations
from gemmule.data.corpus import Corpus, open_corpus
from gemmule.data.packing import MixedRows, WholeDocuments
from gemmule.data.shards import ShardWriter
from gemmule.errors import DatasetError

# A conversation as the lengths of (prompt, reply) of its turns.
Conversation = list[tuple[int, int]]


def masked_corpus(folder: Path, conversations: list[Conversation], shards: int = 1) -> Corpus:
    """Write documents of which no two tokens are the same: turns of untrained and trained tokens, and a last one."""
    ids, names = iter(range(1, 60_000)), []
    for number in range(shards):
        names.append(f"train-{number:05d}.tokens")
        writer = ShardWriter(folder / names[-1], FINGERPRINT, 60_000, masked=True)
        for turns in conversations[number::shards]:
            mask = [trained for prompt, reply in turns for trained in [*[False] * prompt, *[True] * reply]] + [False]
            writer.append([next(ids) for _ in mask], len(turns), mask)
        writer.finalize()
    return open_corpus(folder, names, FINGERPRINT)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        yield Path(folder)


def size(turns: Conversation) -> int:
    """The inputs of a conversation: all tokens before the last trained one."""
    return sum(map(sum, turns)) - 1


conversations = st.lists(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), min_size=1, max_size=12
)


@given(turns=conversations, context=st.integers(4, 30), seed=st.integers(0, 3), shards=st.integers(1, 2))
def test_each_epoch_trains_each_reply_that_fits_once(
    folders: Path, turns: list[Conversation], context: int, seed: int, shards: int
) -> None:
    corpus = masked_corpus(Path(tempfile.mkdtemp(dir=folders)), turns, min(shards, len(turns)))
    fitting = [each for each in turns if size(each) <= context]
    if not fitting:
        with pytest.raises(DatasetError, match=f"conversations fits; the shortest needs {min(map(size, turns))}"):
            PackedConversations(corpus, context, seed, 0)
        return
    rows = PackedConversations(corpus, context, seed, 0)
    assert (rows.kept, rows.too_long) == (len(fitting), len(turns) - len(fitting))
    for epoch in range(2):
        batch = rows.rows(epoch * rows.rows_per_epoch, rows.rows_per_epoch)
        targets = Counter(batch.targets[batch.targets != IGNORED].tolist())
        assert set(targets.values()) == {1}
        assert targets.total() == sum(reply for each in fitting for _, reply in each)
        assert batch.documents is not None
        assert int((batch.documents != PADDING).sum()) == sum(map(size, fitting))


@given(turns=conversations, context=st.integers(4, 30), drop=st.booleans())
def test_a_row_is_whole_conversations_from_their_beginning(
    folders: Path, turns: list[Conversation], context: int, drop: bool
) -> None:
    corpus = masked_corpus(Path(tempfile.mkdtemp(dir=folders)), turns)
    try:
        rows = PackedConversations(corpus, context, 1, 0, drop_turns=drop)
    except DatasetError:
        return
    batch = rows.rows(0, rows.rows_per_epoch)
    assert batch.documents is not None
    for row in range(rows.rows_per_epoch):
        for number, document in enumerate(rows.documents(row)):
            here = batch.documents[row] == number
            tokens, targets = batch.tokens[row, here].tolist(), batch.targets[row, here].tolist()
            ids = corpus.read(document, 0, 999).tolist()
            mask = corpus.read_mask(document, 0, 999).tolist()
            assert tokens == ids[: len(tokens)]
            assert targets == [i if own else IGNORED for i, own in zip(ids[1:], mask[1:], strict=True)][: len(tokens)]
            # The last target ends a reply, so none is cut.
            assert mask[len(tokens) : len(tokens) + 2] == [True, False]


def test_the_last_turns_are_dropped_of_what_is_too_long(tmp_path: Path) -> None:
    turns: list[Conversation] = [[(3, 3), (2, 2), (5, 5)], [(2, 2)], [(9, 9)]]
    corpus = masked_corpus(tmp_path, turns)
    whole = PackedConversations(corpus, 12, 0, 0)
    assert (whole.kept, whole.too_long, whole.shortened) == (1, 2, 0)
    assert "2 longer than train.context = 12 left out" in whole.describe()
    rows = PackedConversations(corpus, 12, 0, 0, drop_turns=True)
    assert (rows.kept, rows.too_long, rows.shortened, rows.dropped_replies) == (2, 1, 1, 1)
    assert "12 left out; 1 without their last turns (1 replies left out)" in rows.describe()
    batch = rows.rows(0, rows.rows_per_epoch)
    assert sorted(batch.targets[batch.targets != IGNORED].tolist()) == [4, 5, 6, 9, 10, 24, 25]


@given(turns=conversations, context=st.integers(8, 30), first=st.integers(0, 30), count=st.integers(1, 5))
def test_rows_are_a_pure_function_of_their_number(
    folders: Path, turns: list[Conversation], context: int, first: int, count: int
) -> None:
    corpus = masked_corpus(Path(tempfile.mkdtemp(dir=folders)), turns)
    try:
        used = PackedConversations(corpus, context, 5, 0)
    except DatasetError:
        return
    used.rows(3, 4)
    together = used.rows(first, count)
    for row in range(count):
        alone = PackedConversations(corpus, context, 5, 0).rows(first + row, 1)
        for one, other in zip(alone[:3], together[:3], strict=True):
            assert torch.equal(one[0], other[row])  # type: ignore[index]


def test_epochs_have_other_orders(tmp_path: Path) -> None:
    rows = PackedConversations(masked_corpus(tmp_path, [[(4, 4)]] * 30), 7, 0, 0)
    orders = [[rows.documents(epoch * 30 + row) for row in range(30)] for epoch in range(2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@given(turns=conversations, context=st.integers(8, 60))
def test_a_pair_stays_in_one_row(folders: Path, turns: list[Conversation], context: int) -> None:
    corpus = masked_corpus(Path(tempfile.mkdtemp(dir=folders)), turns + turns)
    try:
        rows = PackedConversations(corpus, context, 1, 0, group=2)
    except DatasetError:
        return
    found: list[int] = []
    for row in range(rows.rows_per_epoch):
        documents = rows.documents(row)
        assert [document % 2 for document in documents] == [0, 1] * (len(documents) // 2)
        assert all(rejected == chosen + 1 for chosen, rejected in zip(documents[::2], documents[1::2], strict=True))
        found += documents
    both = turns + turns
    pairs = [(n, n + 1) for n in range(0, len(both), 2) if size(both[n]) + size(both[n + 1]) <= context]
    assert sorted(found) == [document for pair in pairs for document in pair]


@given(turns=conversations, context=st.integers(2, 30), limit=st.integers(1, 40))
def test_validation_scores_each_trained_token_once(
    folders: Path, turns: list[Conversation], context: int, limit: int
) -> None:
    corpus = masked_corpus(Path(tempfile.mkdtemp(dir=folders)), turns)
    whole = WholeDocuments(corpus, context, 2, 0)
    targets = torch.cat([batch.targets.flatten() for batch in whole])
    trained = [reply for each in turns for _, reply in each]
    assert len(set(targets[targets != IGNORED].tolist())) == int((targets != IGNORED).sum()) == sum(trained)
    assert (whole.targets, whole.documents) == (sum(trained), len(turns))
    sums = np.cumsum([sum(reply for _, reply in each) for each in turns])
    some = WholeDocuments(corpus, context, 2, 0, limit_tokens=limit)
    assert some.targets == sums[min(int(np.searchsorted(sums, limit)), len(turns) - 1)]


def test_conversations_mix_with_others(tmp_path: Path) -> None:
    one, other = (PackedConversations(masked_corpus(tmp_path, [[(4, 4)]] * 9), 7, seed, 0) for seed in (0, 1))
    batch = MixedRows([one, other], [3.0, 1.0]).rows(0, 8)
    assert batch.documents is not None
    assert batch.tokens.shape == batch.documents.shape == (8, 7)
