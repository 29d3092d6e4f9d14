import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemmule.errors import DeviceError
from gemmule.inference.kv_cache import KVCache, pages_of
from gemmule.inference.pages import KINDS, PAGE
from gemmule.serve.cache_size import available_memory, cache_bound, page_bytes
from tiny import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_page_are_those_of_the_cache(kind: str, dtype: torch.dtype) -> None:
    config = tiny_config()
    cache = KVCache(config, 2, 64, None, dtype, CPU)
    assert page_bytes(config, kind, dtype) == cache.pools[kind].page_bytes  # type: ignore[index, arg-type]


@given(
    available=st.integers(1 << 10, 1 << 24),
    rows=st.integers(1, 64),
    longest=st.integers(2, 2000),
    chunk=st.integers(1, 300),
    window=st.integers(2, 600),
    pattern=st.integers(1, 7),
)
def test_a_bound_is_kept_and_has_room_for_one_of_the_longest(
    available: int, rows: int, longest: int, chunk: int, window: int, pattern: int
) -> None:
    config = tiny_config(sliding_window=window, sliding_window_pattern=pattern)
    need = {kind: pages_of(config, kind, longest, chunk) for kind in KINDS}
    least = sum(count * page_bytes(config, kind, torch.float32) for kind, count in need.items())
    if available < least:
        with pytest.raises(DeviceError, match="--cache"):
            cache_bound(config, available, rows, longest, chunk, torch.float32)
        return
    bound = cache_bound(config, available, rows, longest, chunk, torch.float32)
    assert bound.bytes <= available
    assert bound.bytes == sum(bound.size.pages(kind) * page_bytes(config, kind, torch.float32) for kind in KINDS)
    for kind in {*config.layer_kinds}:
        assert bound.size.pages(kind) >= need[kind]
    assert bound.tokens >= longest - PAGE
    assert bound.tokens > 0


def test_most_of_the_bytes_are_used() -> None:
    config = tiny_config()
    bound = cache_bound(config, 1 << 24, 8, 256, 32, torch.float32)
    assert bound.bytes > 0.99 * (1 << 24)


def test_a_machine_has_memory() -> None:
    assert 1 << 20 < available_memory(CPU) < 1 << 50
