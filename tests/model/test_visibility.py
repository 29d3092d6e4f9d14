"""Every mask as a table that a reader checks by eye: a row for each query, a column for each key, 1 is visible."""

import torch

from gemmule.model.attention import Visibility
from gemmule.model.cache import Cache
from gemmule.model.config import Kind
from tiny import tiny_config


def draw(visibility: Visibility, row: int = 0) -> list[str]:
    return [" ".join("01"[int(key)] for key in query) for query in visibility.rule()[row, 0].tolist()]


def count(first: int, last: int) -> torch.Tensor:
    return torch.arange(first, last + 1)[None]


def test_global_layers_see_everything_before() -> None:
    now = count(0, 4)
    assert draw(Visibility(now, now, window=None)) == [
        "1 0 0 0 0",
        "1 1 0 0 0",
        "1 1 1 0 0",
        "1 1 1 1 0",
        "1 1 1 1 1",
    ]


def test_promise_of_causality_needs_no_table() -> None:
    now = count(0, 4)
    promised = Visibility(now, now, window=None, causal=True)
    assert promised.table is None
    assert torch.equal(promised.rule(), torch.ones(5, 5).tril().bool()[None, None])


def test_window_includes_self() -> None:
    now = count(0, 5)
    assert draw(Visibility(now, now, window=3)) == [
        "1 0 0 0 0 0",
        "1 1 0 0 0 0",
        "1 1 1 0 0 0",
        "0 1 1 1 0 0",
        "0 0 1 1 1 0",
        "0 0 0 1 1 1",
    ]


def test_window_of_one_sees_self_alone() -> None:
    now = count(0, 2)
    assert draw(Visibility(now, now, window=1)) == [
        "1 0 0",
        "0 1 0",
        "0 0 1",
    ]


def test_window_longer_than_the_sequence_is_causal() -> None:
    now = count(0, 3)
    assert draw(Visibility(now, now, window=9)) == [
        "1 0 0 0",
        "1 1 0 0",
        "1 1 1 0",
        "1 1 1 1",
    ]


def test_documents_do_not_see_each_other() -> None:
    now, documents = count(0, 4), torch.tensor([[7, 7, 8, 8, 8], [1, 2, 2, 2, 1]])
    visibility = Visibility(now, now, None, documents, documents)
    assert draw(visibility) == [
        "1 0 0 0 0",
        "1 1 0 0 0",
        "0 0 1 0 0",
        "0 0 1 1 0",
        "0 0 1 1 1",
    ]
    assert draw(visibility, row=1) == [
        "1 0 0 0 0",
        "0 1 0 0 0",
        "0 1 1 0 0",
        "0 1 1 1 0",
        "1 0 0 0 1",
    ]


def test_documents_and_window_both_limit() -> None:
    now, documents = count(0, 5), torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert draw(Visibility(now, now, 3, documents, documents)) == [
        "1 0 0 0 0 0",
        "1 1 0 0 0 0",
        "0 0 1 0 0 0",
        "0 0 1 1 0 0",
        "0 0 1 1 1 0",
        "0 0 0 1 1 1",
    ]


def after_chunks(*chunks: torch.Tensor, documents: list[torch.Tensor] | None = None) -> dict[Kind, Visibility]:
    """Announce chunks of positions to a cache whose local layers have a window of 3; return what the last one sees."""
    cache = Cache(tiny_config(sliding_window=3))
    seen = [cache.extend(chunk, documents[i] if documents else None) for i, chunk in enumerate(chunks)]
    return seen[-1]


def test_cached_chunk_sees_what_is_kept_and_itself() -> None:
    seen = after_chunks(count(0, 3), count(4, 6))
    assert draw(seen["global"]) == [
        "1 1 1 1 1 0 0",
        "1 1 1 1 1 1 0",
        "1 1 1 1 1 1 1",
    ]
    assert seen["local"].key_positions.tolist() == [[2, 3, 4, 5, 6]]
    assert draw(seen["local"]) == [
        "1 1 1 0 0",
        "0 1 1 1 0",
        "0 0 1 1 1",
    ]


def test_cached_token_sees_its_window() -> None:
    seen = after_chunks(count(0, 3), count(4, 4), count(5, 5))
    assert draw(seen["global"]) == ["1 1 1 1 1 1"]
    assert seen["local"].key_positions.tolist() == [[3, 4, 5]]
    assert draw(seen["local"]) == ["1 1 1"]


def test_left_padding_is_seen_by_padding_alone() -> None:
    positions = count(0, 4) - torch.tensor([[0], [2]])
    documents = torch.where(positions < 0, -1, 0)
    seen = after_chunks(positions, documents=[documents])
    assert draw(seen["global"], row=1) == [
        "1 0 0 0 0",
        "1 1 0 0 0",
        "0 0 1 0 0",
        "0 0 1 1 0",
        "0 0 1 1 1",
    ]
    assert draw(seen["local"], row=0) == [
        "1 0 0 0 0",
        "1 1 0 0 0",
        "1 1 1 0 0",
        "0 1 1 1 0",
        "0 0 1 1 1",
    ]


def test_left_padding_stays_unseen_in_the_cache() -> None:
    first = count(0, 2) - torch.tensor([[0], [2]])
    then = count(3, 3) - torch.tensor([[0], [2]])
    documents = [torch.where(positions < 0, -1, 0) for positions in (first, then)]
    seen = after_chunks(first, then, documents=documents)
    assert draw(seen["global"], row=0) == ["1 1 1 1"]
    assert draw(seen["global"], row=1) == ["0 0 1 1"]
    assert draw(seen["local"], row=0) == ["1 1 1"]
    assert draw(seen["local"], row=1) == ["0 1 1"]
