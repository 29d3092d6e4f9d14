"""The paged KV cache and its tree: what is kept, what is computed again, what is given back."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmule.inference.engine import Engine
from gemmule.inference.kv_cache import CacheSize, KVCache, exact_size
from gemmule.inference.pages import PAGE, OutOfPages
from gemmule.inference.requests import Request
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from tiny import lively_model, shallow_config

GREEDY = SamplingSettings(temperature=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return two_layers(37)


def two_layers(window: int) -> Gemma3:
    """Return a model with a layer of each kind."""
    shape = {"num_hidden_layers": 2, "sliding_window_pattern": 2, "max_position_embeddings": 4000}
    return lively_model(shallow_config(sliding_window=window, **shape))


def reply(engine: Engine, prompt: Sequence[int], count: int = 20) -> tuple[list[int], int]:
    """Return the reply to a prompt, and how many tokens the model read for it."""
    before = engine.tokens_run
    (sequence,) = engine.submit(Request(tuple(prompt), count, GREEDY, 0))
    while not engine.idle:
        engine.step()
    return sequence.generated, engine.tokens_run - before


def held(cache: KVCache) -> dict[str, int]:
    return {kind: pool.size - pool.available for kind, pool in cache.pools.items()}


def test_the_twelfth_turn_of_a_conversation_computes_its_own_tokens_and_at_most_16_more(model: Gemma3) -> None:
    """So does going back to the sixth turn, going on there, and returning to the twelfth."""
    engine = Engine(model, 2, 2000, "plain")
    said: list[int] = [2]
    turns: list[list[int]] = []
    for turn in range(12):
        said += [3 + (turn * 7 + i) % 40 for i in range(30)]
        new = len(said) - (len(turns[-1]) if turns else 0)
        answer, run = reply(engine, said)
        assert run <= new + len(answer) - 1 + PAGE + (0 if turns else 1)
        said += answer
        turns.append([*said])
    for number in (5, 11, 2, 11):
        said = [*turns[number], *range(5, 30)]
        answer, run = reply(engine, said)
        assert run <= 25 + 1 + len(answer) - 1 + PAGE
        assert answer == reply(Engine(model, 1, 2000, "plain"), said)[0]


@pytest.mark.parametrize("window", [2, 8, 37])
def test_a_turn_continues_from_the_last_full_page_wherever_the_turn_before_it_ended(window: int) -> None:
    counts = range(90, 107)
    engine = Engine(two_layers(window), len(counts), 400, "plain")
    prompts = {count: (count % 17, *(7 + i % 40 for i in range(29))) for count in counts}
    turns = {count: engine.submit(Request(prompts[count], count, GREEDY, 0))[0] for count in counts}
    while not engine.idle:
        engine.step()
    for count, turn in turns.items():
        (sequence,) = engine.submit(Request((*prompts[count], *turn.generated, 3, 4), 1, GREEDY, 0))
        engine.step()
        assert sequence.cached == (30 + count - 1) // PAGE * PAGE


def test_a_prompt_that_is_answered_again_is_not_read_again(model: Gemma3) -> None:
    engine = Engine(model, 1, 2000, "plain")
    prompt = [7 + i % 40 for i in range(301)]
    first, run = reply(engine, prompt, 200)
    assert run == 301 + 199
    assert reply(engine, prompt, 200) == (first, 301 % PAGE + 199)


def test_samples_of_a_request_read_the_prompt_once(model: Gemma3) -> None:
    engine = Engine(model, 5, 2000, "plain", chunk=50)
    samples = engine.submit(Request(tuple(7 + i % 40 for i in range(333)), 10, SamplingSettings(), 1, samples=5))
    while not engine.idle:
        engine.step()
    assert engine.tokens_run == 333 + 5 * 9
    assert len({tuple(sample.generated) for sample in samples}) > 1


def test_local_layers_keep_their_window_and_little_more(model: Gemma3) -> None:
    engine = Engine(model, 1, 4000, "plain", chunk=64)
    engine.submit(Request(tuple(7 + i % 40 for i in range(3001)), 2, GREEDY, 0))
    most = 0
    while not engine.idle:
        engine.step()
        most = max(most, held(engine.cache)["local"])
    assert held(engine.cache)["global"] == 3001 // PAGE
    window, kept = engine.cache.window_pages, held(engine.cache)["local"]
    assert kept <= 3001 // PAGE / 4 + 2 * window + 1
    assert most <= kept + 64 // PAGE + window + 2


@pytest.mark.parametrize("shared", [1000, 1100, 1990])
def test_a_prompt_goes_on_from_near_the_place_where_it_leaves_an_earlier_one(model: Gemma3, shared: int) -> None:
    engine = Engine(model, 1, 4000, "plain")
    text = [7 + i * i % 40 for i in range(2001)]
    reply(engine, text, 1)
    (sequence,) = engine.submit(Request((*text[:shared], 3, 4), 1, GREEDY, 0))
    engine.step()
    assert shared - 4 * engine.cache.window_pages * PAGE - PAGE <= sequence.cached <= shared


def test_pages_used_longest_ago_go_first(model: Gemma3) -> None:
    size = exact_size(model.config, 3, 160, 128)
    engine = Engine(model, 1, 160, "plain", size=size)
    prompts = [[first, *range(3, 45), *range(3, 45), *range(3, 45)] for first in (1, 2, 3)]
    for prompt in prompts:
        reply(engine, prompt)
    again = [reply(engine, prompt)[1] for prompt in (prompts[2], prompts[1])]
    assert all(run < 127 for run in again), "what was used last is there"
    reply(engine, [9, *prompts[0]])
    reply(engine, [8, *prompts[0]])
    assert reply(engine, prompts[2])[1] == 127 + 19, "what was used before them has gone"


def test_a_cache_without_room_makes_requests_wait_in_their_order(model: Gemma3) -> None:
    size = exact_size(model.config, 2, 100, 128)
    engine = Engine(model, 8, 100, "plain", size=size)
    requests = [Request((1 + number, *range(5, 45)), 59, GREEDY, 0) for number in range(5)]
    sequences = [engine.submit(request)[0] for request in requests]
    ended: list[int] = []
    while not engine.idle:
        for sequence, _ in engine.step():
            if sequence.finish:
                ended.append(sequences.index(sequence))
    assert ended == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="3 sequences of 99 positions: the KV cache is smaller"):
        engine.submit(Request(tuple(range(5, 45)), 60, GREEDY, 0, samples=3))


def test_a_cancelled_request_gives_its_row_and_pages_back_at_once(model: Gemma3) -> None:
    engine = Engine(model, 2, 400, "plain", chunk=16)
    running = engine.submit(Request((5, 6), 300, GREEDY, 0))
    reading = engine.submit(Request(tuple(range(5, 45)) * 5, 50, GREEDY, 0))
    queued = engine.submit(Request((9, 9), 50, GREEDY, 0))
    for _ in range(3):
        engine.step()
    engine.cancel([*reading, *queued])
    (late,) = engine.submit(Request((7, 7), 3, GREEDY, 0))
    engine.step()
    assert len(late.generated) == 1, "the row was free"
    engine.cancel(running)
    while not engine.idle:
        engine.step()
    assert [each.finish for each in (*running, *reading, *queued, late)] == ["cancelled"] * 3 + ["length"]
    assert held(engine.cache) == {kind: len(engine.cache.tree.nodes(kind)) for kind in engine.cache.pools}


def test_an_empty_page_holds_nothing_of_an_earlier_sequence() -> None:
    cache = KVCache(shallow_config(), 1, 64, CacheSize(1, 1), torch.float32, CPU)
    for pool in cache.pools.values():
        page = pool.take()
        pool.memory[page] = torch.nan
        pool.release(page)
        assert pool.take() == page
        assert not pool.memory[page].any()
        with pytest.raises(OutOfPages):
            pool.take()


class Reader:
    """Moves sequences through a cache as the engine does, and knows what must lie in each page."""

    def __init__(self, window: int, pages: int) -> None:
        config = shallow_config(sliding_window=window)
        self.cache = KVCache(config, 4, 320, CacheSize(pages, pages), torch.float32, CPU)
        self.tokens: dict[int, list[int]] = {}

    def read(self, row: int, tokens: Sequence[int]) -> None:
        """Write each prefix's hash where the key of its last token lies."""
        first = self.cache.extend(row, tokens)
        assert first == len(self.tokens[row])
        self.tokens[row] += tokens
        for position in range(first, first + len(tokens)):
            for number in self.place(row, position):
                number[:] = hash(tuple(self.tokens[row][: position + 1])) % 2**20
        self.cache.settle(row)

    def place(self, row: int, position: int) -> list[torch.Tensor]:
        """Return a number of each kind that stands for the key of a position."""
        numbers = []
        for own, pool in self.cache.pools.items():
            page = int(self.cache.tables[own][row, position // PAGE])
            assert page
            assert pool.holders(page)
            numbers.append(pool.memory[page, position % PAGE : position % PAGE + 1])
        return numbers

    def check(self, row: int) -> None:
        """What the next token attends to is what was written for this sequence."""
        length, window = len(self.tokens[row]), self.cache.config.sliding_window
        for kind, pool in self.cache.pools.items():
            for position in range(max(0, length - window + 1) if kind == "local" else 0, length):
                page = int(self.cache.tables[kind][row, position // PAGE])
                assert page
                assert pool.memory[page, position % PAGE] == hash(tuple(self.tokens[row][: position + 1])) % 2**20


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([1, 2, 16, 17, 40, 500]),
    events=st.lists(
        st.tuples(st.sampled_from(["begin", "read", "fork", "finish"]), st.integers(0, 3), st.integers(1, 70)),
        max_size=60,
    ),
)
def test_every_sequence_finds_its_own_tokens_whatever_the_others_do(
    window: int, events: list[tuple[str, int, int]]
) -> None:
    reader = Reader(window, pages=90)
    cache, text = reader.cache, [1, 2] * 160
    for event, row, count in events:
        if event == "begin" and row not in reader.tokens:
            prompt = [*text[: 2 * count], count % 3]
            known = cache.begin(row, prompt, cache.need(320, 70))
            assert known % PAGE == 0
            assert known < len(prompt)
            reader.tokens[row] = prompt[:known]
            reader.check(row)
            for first in range(known, len(prompt), 70):
                reader.read(row, prompt[first : first + 70])
        elif event == "read" and row in reader.tokens and len(reader.tokens[row]) + count <= 320:
            reader.read(row, [count % 5] * count)
        elif event == "fork" and row in reader.tokens and (other := (row + count) % 4) not in reader.tokens:
            cache._promise(cache.need(320, 70), 1)
            cache.fork(row, other)
            reader.tokens[other] = [*reader.tokens[row]]
            for each, token in ((row, 8), (other, 9)):
                if len(reader.tokens[each]) < 320:
                    reader.read(each, [token])
        elif event == "finish" and row in reader.tokens:
            cache.finish(row)
            del reader.tokens[row]
        for each in reader.tokens:
            reader.check(each)
    for row in reader.tokens:
        cache.finish(row)
    for kind, pool in cache.pools.items():
        assert pool.size - pool.available == len(cache.tree.nodes(kind))
        while cache.tree.evict(kind):
            pass
    for pool in cache.pools.values():
        assert pool.size == pool.available
    assert not cache.tree.root.children
