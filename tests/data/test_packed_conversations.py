"""Training rows of whole conversations."""

import random
import tempfile
from pathlib import Path

import pytest
import torch
from corpora import write_corpus
from hypothesis import given
from hypothesis import strategies as st

from gemmule.data.batches import IGNORED, PADDING
from gemmule.data.corpus import Corpus
from gemmule.data.packing import PackedConversations, WholeDocuments
from gemmule.errors import DatasetError

CONTEXT = 12


def masked_corpus(folder: Path, lengths: list[int], seed: int = 0) -> tuple[Corpus, list[list[int]], list[list[bool]]]:
    """Documents in which every token occurs once, the last one of each trained on."""
    draw, first = random.Random(seed), 1
    documents, masks = [], []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        masks.append([False, *(draw.random() < 0.5 for _ in range(length - 2)), True])
        first += length
    return write_corpus(folder, documents, masks=masks), documents, masks


@given(
    lengths=st.lists(st.integers(2, 20), min_size=2, max_size=12),
    seed=st.integers(0, 3),
    group=st.sampled_from([1, 2]),
)
def test_each_epoch_has_every_conversation_that_fits_once_and_whole(lengths: list[int], seed: int, group: int) -> None:
    lengths = lengths[: len(lengths) // group * group]
    groups = [range(first, first + group) for first in range(0, len(lengths), group)]
    fitting = [each for each in groups if sum(lengths[number] - 1 for number in each) <= CONTEXT]
    with tempfile.TemporaryDirectory() as folder:
        corpus, documents, masks = masked_corpus(Path(folder), lengths, seed)
        if not fitting:
            with pytest.raises(DatasetError, match=f"train.context = {CONTEXT}: none of the"):
                PackedConversations(corpus, CONTEXT, seed, 0, group)
            return
        stream = PackedConversations(corpus, CONTEXT, seed, 0, group)
        assert stream.too_long == len(groups) - len(fitting)
        for epoch in range(2):
            first = epoch * stream.rows_per_epoch
            batch = stream.rows(first, stream.rows_per_epoch)
            assert batch.documents is not None
            found = []
            for row in range(stream.rows_per_epoch):
                members = stream.documents(first + row)
                found += members
                for number, document in enumerate(members):
                    there = batch.documents[row] == number
                    assert batch.tokens[row][there].tolist() == documents[document][:-1]
                    goals = zip(documents[document][1:], masks[document][1:], strict=True)
                    assert batch.targets[row][there].tolist() == [i if known else IGNORED for i, known in goals]
                    assert document % group == number % group
                padding = batch.documents[row] == PADDING
                assert (batch.targets[row][padding] == IGNORED).all()
                assert int(padding.sum()) == CONTEXT - sum(lengths[document] - 1 for document in members)
            assert sorted(found) == [number for each in fitting for number in each]


def test_rows_are_a_function_of_their_number_and_of_the_seed(tmp_path: Path) -> None:
    corpus, *_ = masked_corpus(tmp_path, [7, 5, 3, 9, 4, 6, 8, 2])
    stream = PackedConversations(corpus, CONTEXT, 1, 0)
    together = stream.rows(0, 9)
    for row in range(9):
        assert torch.equal(PackedConversations(corpus, CONTEXT, 1, 0).rows(row, 1).tokens[0], together.tokens[row])
    assert not torch.equal(PackedConversations(corpus, CONTEXT, 2, 0).rows(0, 9).tokens, together.tokens)


def test_rows_waste_little(tmp_path: Path) -> None:
    draw = random.Random(0)
    corpus, *_ = masked_corpus(tmp_path, [draw.randint(20, 200) for _ in range(300)])
    stream = PackedConversations(corpus, 256, 0, 0)
    filled = sum(int(length) - 1 for length in corpus.lengths)
    assert filled / (256 * stream.rows_per_epoch) > 0.94


def test_validation_counts_trained_tokens_alone(tmp_path: Path) -> None:
    corpus, _, masks = masked_corpus(tmp_path, [7, 5, 3, 9])
    whole = WholeDocuments(corpus, 6, 2, 0)
    trained = sum(sum(mask[1:]) for mask in masks)
    assert whole.targets == trained
    assert sum(batch.num_targets for batch in whole) == trained
