"""Every mask as a table that a reader checks by eye: a row for each query, a column for each key, 1 is visible."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemmule.model.attention import AttentionMask
from gemmule.model.cache import Cache
from gemmule.model.config import Kind
from tiny import tiny_config


def draw(mask: AttentionMask, row: int = 0) -> list[str]:
    return [" ".join("01"[int(key)] for key in query) for query in mask.dense()[row, 0].tolist()]


def count(first: int, last: int) -> torch.Tensor:
    return torch.arange(first, last + 1)[None]


class Made(TorchDispatchMode):
    """Notes the dtype of each tensor that is made with at least so many elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.dtypes = least, set[torch.dtype]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.least:
            self.dtypes.add(result.dtype)
        return result


def test_a_mask_makes_nothing_but_booleans_of_all_pairs() -> None:
    now, documents = count(0, 63), torch.arange(2 * 64).view(2, 64) // 9
    with Made(64 * 64) as made:
        for window in (None, 5):
            for each in (None, documents):
                assert AttentionMask(now, now, window, each, each).values is not None
    assert made.dtypes == {torch.bool}


def test_global_layers_see_everything_before() -> None:
    now = count(0, 4)
    assert draw(AttentionMask(now, now, window=None)) == [
        "1 0 0 0 0",
        "1 1 0 0 0",
        "1 1 1 0 0",
        "1 1 1 1 0",
        "1 1 1 1 1",
    ]


def test_promise_of_causality_needs_no_table() -> None:
    now = count(0, 4)
    promised = AttentionMask(now, now, window=None, causal=True)
    assert promised.values is None
    assert torch.equal(promised.dense(), torch.ones(5, 5).tril().bool()[None, None])


def test_window_includes_self() -> None:
    now = count(0, 5)
    assert draw(AttentionMask(now, now, window=3)) == [
        "1 0 0 0 0 0",
        "1 1 0 0 0 0",
        "1 1 1 0 0 0",
        "0 1 1 1 0 0",
        "0 0 1 1 1 0",
        "0 0 0 1 1 1",
    ]


def test_window_of_one_sees_self_alone() -> None:
    now = count(0, 2)
    assert draw(AttentionMask(now, now, window=1)) == [
        "1 0 0",
        "0 1 0",
        "0 0 1",
    ]


def test_window_longer_than_the_sequence_is_causal() -> None:
    now = count(0, 3)
    assert draw(AttentionMask(now, now, window=9)) == [
        "1 0 0 0",
        "1 1 0 0",
        "1 1 1 0",
        "1 1 1 1",
    ]


def test_documents_do_not_see_each_other() -> None:
    now, documents = count(0, 4), torch.tensor([[7, 7, 8, 8, 8], [1, 2, 2, 2, 1]])
    mask = AttentionMask(now, now, None, documents, documents)
    assert draw(mask) == [
        "1 0 0 0 0",
        "1 1 0 0 0",
        "0 0 1 0 0",
        "0 0 1 1 0",
        "0 0 1 1 1",
    ]
    assert draw(mask, row=1) == [
        "1 0 0 0 0",
        "0 1 0 0 0",
        "0 1 1 0 0",
        "0 1 1 1 0",
        "1 0 0 0 1",
    ]


def test_documents_and_window_both_limit() -> None:
    now, documents = count(0, 5), torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert draw(AttentionMask(now, now, 3, documents, documents)) == [
        "1 0 0 0 0 0",
        "1 1 0 0 0 0",
        "0 0 1 0 0 0",
        "0 0 1 1 0 0",
        "0 0 1 1 1 0",
        "0 0 0 1 1 1",
    ]


def after_chunks(*chunks: torch.Tensor, documents: list[torch.Tensor] | None = None) -> dict[Kind, AttentionMask]:
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
