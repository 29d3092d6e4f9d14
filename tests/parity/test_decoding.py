"""What comes out of a cache is what transformers makes of the whole text, however it was cut into chunks."""

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from twin import MARKS, SHAPES, TOLERANCE, twin_of

from gemmule.model.attention import KERNELS
from gemmule.model.cache import Cache
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

pytestmark = MARKS

WINDOW = tiny_config().sliding_window
LONG = 12 * WINDOW  # far beyond the window


def all_cuts(length: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to cut a text into chunks, 2^(length - 1) of them."""
    for count in range(length):
        yield from combinations(range(1, length), count)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [1, 3, WINDOW])
def test_every_chunking_of_a_prompt_is_the_same(window: int, kernel: str) -> None:
    """And so is the token decoded after it, whatever the chunks left in the cache."""
    model = lively_model(tiny_config(sliding_window=window), kernel)
    tokens, prompt = some_tokens(model.config, length=9), 8
    with torch.no_grad():
        theirs = twin_of(model)(input_ids=tokens).logits
        chunkings = list(all_cuts(prompt))
        for cuts in chunkings:
            cache = Cache(model.config)
            ours = [model(chunk, cache=cache) for chunk in tokens.tensor_split((*cuts, prompt), dim=1)]
            assert greatest_difference(torch.cat(ours, dim=1), theirs) <= TOLERANCE, cuts
    assert len(set(chunkings)) == 128


@pytest.mark.parametrize("prefill", [1, WINDOW + 1, 4 * WINDOW])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_decoding_is_the_same_far_beyond_the_window(shape: str, prefill: int) -> None:
    """Token by token, against their cache and against their view of the whole text."""
    model = lively_model(tiny_config(**SHAPES[shape]))
    twin, tokens = twin_of(model), some_tokens(model.config, length=LONG)
    cache, memory, answers = Cache(model.config), None, []
    with torch.no_grad():
        whole = twin(input_ids=tokens).logits
        for chunk in tokens.split([prefill] + [1] * (LONG - prefill), dim=1):
            theirs = twin(input_ids=chunk, past_key_values=memory, use_cache=True)
            memory = theirs.past_key_values
            answers.append(model(chunk, cache=cache))
            # For a window of one their cache keeps everything (it slices [-window + 1:]), unlike their whole view.
            if model.config.sliding_window > 1:
                assert greatest_difference(answers[-1], theirs.logits) <= TOLERANCE
    assert greatest_difference(torch.cat(answers, dim=1), whole) <= TOLERANCE


@pytest.mark.parametrize("kernel", KERNELS)
def test_cached_decoding_of_a_left_padded_batch_is_the_same(kernel: str) -> None:
    model = lively_model(tiny_config(), kernel)
    twin, padding, prefill = twin_of(model), torch.tensor([[0], [WINDOW + 2], [3 * WINDOW]]), 3 * WINDOW + 1
    tokens = some_tokens(model.config, rows=3, length=LONG)
    positions = torch.arange(LONG)[None] - padding
    real = positions >= 0
    cache, memory, end = Cache(model.config), None, 0
    with torch.no_grad():
        for size in [prefill] + [1] * (LONG - prefill):
            start, end = end, end + size
            theirs = twin(
                input_ids=tokens[:, start:end],
                attention_mask=real[:, :end].long(),
                position_ids=positions[:, start:end].clamp(min=0),
                past_key_values=memory,
                use_cache=True,
            )
            memory, seen = theirs.past_key_values, real[:, start:end]
            ours = model(tokens[:, start:end], positions[:, start:end], torch.where(seen, 0, -1), cache)
            assert greatest_difference(ours[seen], theirs.logits[seen]) <= TOLERANCE
