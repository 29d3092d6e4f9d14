"""A reply depends on its request alone: bit for bit the same in any company, with any chunks, cached or not."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gemmule.inference.engine import Engine, TokenEvent
from gemmule.inference.kv_cache import CacheSize, exact_size
from gemmule.inference.native.library import load_library
from gemmule.inference.requests import Event, Request, SequenceState
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from tiny import lively_model, shallow_config

pytestmark = pytest.mark.skipif(isinstance(load_library(), str), reason="no C compiler here")

LONGEST = 400


class RecordingEngine(Engine):
    """An engine that keeps the logits of every draw."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logits: dict[SequenceState, list[Tensor]] = {}

    def _draw(self, logits: Tensor) -> list[TokenEvent]:
        for row, sequence in enumerate(self._decoding.values()):
            self.logits.setdefault(sequence, []).append(logits[row].clone())
        return super()._draw(logits)


def random_request(draw: random.Random, vocabulary: int) -> Request:
    """Return a request whose prompt often begins like that of another."""
    shared = random.Random(draw.choice((1, 2, 3)))
    beginning = [shared.randrange(vocabulary) for _ in range(200)][: draw.choice((0, 5, 16, 40, 64, 150))]
    own = [draw.randrange(vocabulary) for _ in range(draw.choice((1, 2, 15, 16, 17, 33, 100)))]
    sampling = SamplingSettings(
        temperature=draw.choice((0.0, 0.7, 1.0, 2.0)),
        top_k=draw.choice((0, 0, 5)),
        top_p=draw.choice((1.0, 0.8)),
        min_p=draw.choice((0.0, 0.1)),
        repetition_penalty=draw.choice((1.0, 1.3)),
        presence_penalty=draw.choice((0.0, 0.5)),
        frequency_penalty=draw.choice((0.0, 0.5)),
        logit_bias=draw.choice(((), ((3, -100.0), (5, 2.0)))),
    )
    stops = frozenset(draw.sample(range(vocabulary), draw.choice((0, 3))))
    return Request(
        (*beginning, *own),
        draw.randint(1, 60),
        sampling,
        draw.getrandbits(64),
        draw.choice((1, 1, 1, 2, 4)),
        stops,
        min_new_tokens=draw.choice((0, 0, 10)),
        log_probabilities=draw.choice((None, 0, 3)),
        prompt_log_probabilities=draw.choice((None, None, None, 2)),
    )


Events = dict[SequenceState, list[Event]]


def step(engine: Engine, events: Events) -> None:
    for sequence, event in engine.step():
        assert event is not None
        events.setdefault(sequence, []).append(event)


def alone(model: Gemma3, request: Request) -> list[tuple[SequenceState, list[Event], Tensor]]:
    """Return each sample, its events and logits, in an engine of its own, its prompt read at once."""
    engine = RecordingEngine(model, request.samples, LONGEST, "native", chunk=LONGEST)
    samples, events = engine.submit(request), Events()
    while not engine.idle:
        step(engine, events)
    return [(sample, events[sample], torch.stack(engine.logits[sample])) for sample in samples]


def run_crowd(
    engine: Engine, requests: Sequence[Request], draw: random.Random
) -> tuple[list[list[SequenceState]], Events]:
    """Submit requests at random moments, and cancel some; return the samples of each, and what they got."""
    waiting, submitted, events = [*requests], [], Events()
    while waiting or not engine.idle:
        for _ in range(draw.choice((0, 0, 1, 3, 8))):
            if waiting:
                submitted.append(engine.submit(waiting.pop(0)))
        if submitted and draw.random() < 0.1:
            engine.cancel(draw.choice(submitted)[:1])
        step(engine, events)
    return submitted, events


def check_crowd(model: Gemma3, count: int, seed: int, chunk: int, rows: int, size: CacheSize | None) -> None:
    draw = random.Random(seed)
    requests = [random_request(draw, model.config.vocab_size) for _ in range(count)]
    engine = RecordingEngine(model, rows, LONGEST, "native", size=size, chunk=chunk)
    crowd, events = run_crowd(engine, requests, draw)
    finished = cached = 0
    for request, samples in zip(requests, crowd, strict=True):
        for sample, (expected, expected_events, logits) in zip(samples, alone(model, request), strict=True):
            length = len(sample.generated)
            assert sample.finish in (expected.finish, "cancelled")
            assert events.get(sample, []) == expected_events[:length]
            if length:
                assert torch.equal(torch.stack(engine.logits[sample])[:length], logits[:length])
                assert sample.prompt_log_probabilities == expected.prompt_log_probabilities
            finished, cached = finished + (sample.finish != "cancelled"), cached + bool(sample.cached)
    assert finished > count / 2
    assert cached
    for kind, pool in engine.cache.pools.items():
        in_tree = len(engine.cache.tree.nodes(kind))
        assert pool.size - pool.available == in_tree, "only the tree holds pages now"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("chunk", "rows"), [(7, 16), (64, 4)])
def test_replies_are_the_same_bits_alone_and_in_a_crowd(dtype: torch.dtype, chunk: int, rows: int) -> None:
    model = lively_model(shallow_config(sliding_window=21, max_position_embeddings=LONGEST)).to(dtype)
    check_crowd(model, 40, chunk, chunk, rows, None)


def test_replies_are_the_same_bits_where_the_cache_is_too_small_to_keep_much() -> None:
    model = lively_model(shallow_config(sliding_window=21, max_position_embeddings=LONGEST))
    size = exact_size(model.config, 4, LONGEST, 32)
    check_crowd(model, 40, 1, 32, 8, size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 16, 33])
@pytest.mark.parametrize("chunk", [1, 256])
def test_a_thousand_requests_are_the_same_bits_alone_and_in_a_crowd(
    dtype: torch.dtype, window: int, chunk: int
) -> None:
    model = lively_model(shallow_config(sliding_window=window, max_position_embeddings=LONGEST)).to(dtype)
    check_crowd(model, 84, window + chunk, chunk, 64, exact_size(model.config, 20, LONGEST, chunk))
