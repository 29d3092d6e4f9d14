from collections import Counter
from pathlib import Path

import pytest
import torch
from corpora import write_corpus

from gemmule.data.corpus import Corpus
from gemmule.data.packing import MixedRows, PackedRows

CONTEXT = 8


def corpus(folder: Path, source: int, documents: int) -> Corpus:
    """Documents whose tokens tell their source."""
    first = 10 + 100 * source
    return write_corpus(folder, [[2, *range(first, first + 5 + number % 7), 1] for number in range(documents)])


@pytest.fixture
def packed(tmp_path: Path) -> list[PackedRows]:
    made = []
    for source, documents in enumerate((40, 7, 300)):
        (tmp_path / str(source)).mkdir()
        made.append(PackedRows(corpus(tmp_path / str(source), source, documents), CONTEXT, 0, True, 2))
    return made


def owners(mixed: MixedRows, first: int, count: int) -> list[int]:
    return [int(row.max()) // 100 for row in mixed.rows(first, count).tokens]


def test_each_source_gives_its_share_of_the_rows_spread_evenly(packed: list[PackedRows]) -> None:
    found = owners(MixedRows(packed, [3, 1, 4]), 0, 4096)
    assert Counter(found) == {0: 1536, 1: 512, 2: 2048}
    for start in range(0, 4096, 64):
        assert Counter(found[start : start + 64])[2] in (31, 32, 33)
        assert Counter(found[start : start + 64])[1] in (7, 8, 9)


def test_a_source_with_a_tiny_share_has_some_rows(packed: list[PackedRows]) -> None:
    assert Counter(owners(MixedRows(packed, [1e9, 1, 1e-9]), 0, 4096)) == {0: 4094, 1: 1, 2: 1}


def test_rows_of_a_source_are_its_own_stream_one_after_the_other(packed: list[PackedRows]) -> None:
    mixed = MixedRows(packed, [2, 1, 1])
    batch = mixed.rows(0, 5000)  # beyond a round of the pattern
    for source, alone in enumerate(packed):
        mine = torch.tensor(owners(mixed, 0, 5000)) == source
        expected = alone.rows(0, int(mine.sum()))
        assert torch.equal(batch.tokens[mine], expected.tokens)
        assert torch.equal(batch.targets[mine], expected.targets)


def test_rows_are_a_pure_function_of_their_number(packed: list[PackedRows]) -> None:
    mixed = MixedRows(packed, [2, 1, 1])
    together = mixed.rows(4090, 12)
    assert together.documents is not None
    for row in range(12):
        alone = MixedRows(packed, [2, 1, 1]).rows(4090 + row, 1)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.targets[0], together.targets[row])


def test_one_source_is_its_own_stream(packed: list[PackedRows]) -> None:
    assert torch.equal(MixedRows(packed[:1], [5]).rows(7, 20).tokens, packed[0].rows(7, 20).tokens)
