"""What the cache keeps, and that however a text is cut into chunks the logits are those of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemmule.model.attention import KERNELS
from gemmule.model.cache import Cache
from gemmule.model.gemma3 import Gemma3
from tiny import LENGTH, greatest_difference, lively_model, some_tokens, tiny_config

MODELS = {
    (kernel, window): lively_model(tiny_config(sliding_window=window), kernel)
    for kernel in KERNELS
    for window in (1, 2, 5, 40)
}


def in_chunks(model: Gemma3, tokens: Tensor, cuts: list[int], documents: Tensor | None = None) -> Tensor:
    """Return the logits of tokens (B,T) fed to a cache in chunks that end at the cuts."""
    cache = Cache(model.config)
    pieces = tokens.tensor_split(cuts, dim=1)
    labels = [None] * len(pieces) if documents is None else documents.tensor_split(cuts, dim=1)
    return torch.cat([model(piece, None, label, cache) for piece, label in zip(pieces, labels, strict=True)], dim=1)


cuts = st.sets(st.integers(1, LENGTH - 1)).map(sorted)


@settings(max_examples=30)
@given(which=st.sampled_from(sorted(MODELS)), cuts=cuts)
def test_every_chunking_gives_the_logits_of_the_whole(which: tuple[str, int], cuts: list[int]) -> None:
    model = MODELS[which]
    tokens = some_tokens(model.config)
    with torch.no_grad():
        assert greatest_difference(in_chunks(model, tokens, cuts), model(tokens)) < 1e-4


@settings(max_examples=30)
@given(which=st.sampled_from(sorted(MODELS)), cuts=cuts, lengths=st.lists(st.integers(1, 7), min_size=LENGTH))
def test_documents_stay_apart_through_the_cache(which: tuple[str, int], cuts: list[int], lengths: list[int]) -> None:
    model = MODELS[which]
    tokens = some_tokens(model.config)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[:LENGTH].expand(2, -1)
    with torch.no_grad():
        chunked = in_chunks(model, tokens, cuts, documents)
        assert greatest_difference(chunked, model(tokens, documents=documents)) < 1e-4


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 3, 9])
def test_local_layers_keep_one_less_than_the_window(window: int, chunk: int) -> None:
    model = MODELS["sdpa", window]
    cache = Cache(model.config)
    with torch.no_grad():
        for _ in range(10):
            model(some_tokens(model.config, length=chunk), cache=cache)
    assert cache.length == 10 * chunk
    seen = cache.extend(torch.tensor([[cache.length]]), None)
    nothing = torch.zeros(2, 2, 0, 8)
    for layer, kind in enumerate(model.config.layer_kinds):
        key, value = cache.update(layer, nothing, nothing)
        assert key.shape == value.shape
        assert key.shape[2] == (window - 1 if kind == "local" else 10 * chunk)
        assert seen[kind].key_positions.shape[1] == key.shape[2] + 1


def test_what_left_the_window_is_given_back() -> None:
    cache = Cache(tiny_config(num_hidden_layers=1))
    long = torch.zeros(1, 2, 1000, 8)
    cache.update(0, long, long)
    kept = cache._layers[0]
    assert kept is not None
    for tensor in kept:
        assert tensor.untyped_storage().nbytes() == 2 * 4 * 8 * 4, "four tokens, not a view of a thousand"


def test_cache_counts_on() -> None:
    model = MODELS["sdpa", 5]
    tokens, cache = some_tokens(model.config), Cache(model.config)
    with torch.no_grad():
        model(tokens[:, :4], cache=cache)
        assert cache.length == 4
        continued = model(tokens[:, 4:], cache=cache)
        given = Cache(model.config)
        model(tokens[:, :4], torch.arange(4)[None], cache=given)
        assert torch.equal(continued, model(tokens[:, 4:], torch.arange(4, LENGTH)[None], cache=given))
