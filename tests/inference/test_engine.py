from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmule.errors import ModelError, RecipeError
from gemmule.inference import decode as decode_module
from gemmule.inference.runners import Decoding, static_step
from gemmule.inference.engine import (
    Engine,
    Event,
    SequenceState,
    complete,
    encode_prompt,
    generate,
    seeded_generator,
    stop_tokens,
    stream_tokens,
)
from gemmule.inference.native.library import load_library
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3, OutputHead
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

GREEDY = SamplingSettings(temperature=0)
NONE: frozenset[int] = frozenset()
PROMPTS = [[2, 40, 41, 42, 43, 44, 45, 46, 47, 11, 12, 13, 14], [2], [2, 30, 31], [2, 20, 21, 22, 23]]


@pytest.fixture(scope="module")
def speaker(tiny_tokenizer: Tokenizer) -> Gemma3:
    """A lively model of the tiny vocabulary; what it says is nonsense."""
    return lively_model(tiny_config(vocab_size=tiny_tokenizer.vocab_size))


def rows(steps: Sequence[Sequence[int | None]]) -> list[list[int]]:
    """Turn steps of a token per row into the tokens of each row."""
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def greedily(model: Gemma3, prompt: Sequence[int], count: int) -> list[int]:
    """Continue by full forwards alone."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def parrot(model: Gemma3, script: Sequence[int]) -> Gemma3:
    """Make the model say a script, whatever it reads; other tokens have probability zero."""
    said = iter(script)

    def forward(
        tokens: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor, cache: object, output_head: OutputHead
    ) -> torch.Tensor:
        logits = torch.full((tokens.shape[0], 1, model.config.vocab_size), float("-inf"))
        logits[:, :, next(said)] = 0.0
        return logits

    model.forward = forward  # type: ignore[method-assign, assignment]
    return model


@pytest.fixture
def says(tiny_tokenizer: Tokenizer) -> Callable[[Sequence[int]], Gemma3]:
    return lambda script: parrot(lively_model(tiny_config(vocab_size=tiny_tokenizer.vocab_size)), script)


def test_decoding_with_the_cache_equals_full_forwards(speaker: Gemma3) -> None:
    steps = list(stream_tokens(speaker, PROMPTS[:1], 20, NONE, GREEDY))
    assert rows(steps) == [greedily(speaker, PROMPTS[0], 20)]


@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, 379), min_size=1, max_size=12), min_size=1, max_size=4))
def test_rows_of_any_lengths_equal_each_row_alone(speaker: Gemma3, prompts: list[list[int]]) -> None:
    together = rows(list(stream_tokens(speaker, prompts, 8, NONE, GREEDY)))
    assert together == [greedily(speaker, prompt, 8) for prompt in prompts]


def test_rows_end_one_by_one_and_leave_the_others_alone(speaker: Gemma3) -> None:
    alone = [greedily(speaker, prompt, 12) for prompt in PROMPTS]
    stop = alone[1][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in alone]
    assert len({len(row) for row in expected}) > 1
    steps = list(stream_tokens(speaker, PROMPTS, 12, frozenset({stop}), GREEDY))
    assert rows(steps) == expected
    for row, tokens in zip(zip(*steps, strict=True), expected, strict=True):
        assert list(row) == tokens + [None] * (len(steps) - len(tokens)), "nothing follows an end"


def test_nothing_is_computed_after_the_last_row_ended(speaker: Gemma3) -> None:
    first = greedily(speaker, PROMPTS[0], 1)[0]
    steps = list(stream_tokens(speaker, PROMPTS[:1] * 2, 50, frozenset({first}), GREEDY))
    assert steps == [[first, first]]


def test_same_seed_repeats_and_another_does_not(speaker: Gemma3) -> None:
    def sample(seed: int | None) -> list[list[int]]:
        return rows(list(stream_tokens(speaker, PROMPTS, 10, NONE, SamplingSettings(), seed)))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_sampling_leaves_the_global_generator_and_gradients_alone(speaker: Gemma3) -> None:
    before = torch.get_rng_state()
    list(stream_tokens(speaker, PROMPTS, 3, NONE, SamplingSettings(), seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_pausing_a_stream_leaves_the_caller_in_its_own_mode(speaker: Gemma3) -> None:
    stream = stream_tokens(speaker, PROMPTS, 3, NONE, GREEDY)
    next(stream)
    assert not torch.is_inference_mode_enabled()


needs_compiler = pytest.mark.skipif(isinstance(load_library(), str), reason="no C compiler here")
DECODINGS = ["plain", "compiled", pytest.param("native", marks=needs_compiler)]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the static step of the compiled decoder without compiling it."""
    monkeypatch.setattr(decode_module, "_compiled_step", lambda tuned: static_step)
    monkeypatch.setattr(decode_module, "reason_not_to_compile", lambda device: None)


def sequence(prompt: Sequence[int], count: int, seed: int = 0, stop: int = -1, **sampling: Any) -> SequenceState:
    chosen = SamplingSettings(**sampling) if sampling else GREEDY
    return SequenceState(prompt, chosen, seeded_generator(seed), count, frozenset({stop}))


def run_together(engine: Engine, arrivals: dict[int, list[SequenceState]]) -> None:
    """Step until all are finished; at each step number, the sequences that arrive then are inserted as one batch."""
    for number in range(200):
        if number in arrivals:
            engine.insert(arrivals[number])
        if engine.sequences:
            assert engine.step()
    assert not engine.sequences


def alone(model: Gemma3, like: SequenceState, seed: int) -> list[int]:
    """Return what a sequence generates when it is the only one."""
    steps = stream_tokens(model, [like.prompt], like.max_new_tokens, like.stops, like.sampling, seed, "plain")
    return rows(list(steps))[0]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("window", [1, 3, 5, 64])
def test_sequences_that_join_and_leave_generate_what_each_does_alone(window: int, decoding: Decoding) -> None:
    model = lively_model(tiny_config(sliding_window=window))
    prompts = [[2, 40, 41, 42, 43, 44, 45, 46, 47, 11], [2], [2, 30, 31], [2, 20, 21, 22], [9, 8, 7, 6, 5, 4], [3, 1]]
    limits = [12, 30, 1, 7, 20, 9]
    states = [sequence(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    engine = Engine(model, 4, 40, decoding)
    run_together(engine, {0: states[:2], 3: states[2:4], 12: [states[4]], 13: [states[5]]})
    for state, prompt, limit in zip(states, prompts, limits, strict=True):
        assert state.generated == greedily(model, prompt, limit)
        assert (state.finish, state.position) == ("length", len(prompt) + limit)
    engine.insert([again := sequence(prompts[0], 5)])
    run_together(engine, {})
    assert again.generated == states[0].generated[:5], "an engine that ran empty can be filled again"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("decoding", DECODINGS)
def test_draws_depend_on_the_seed_of_the_sequence_alone(decoding: Decoding) -> None:
    model = lively_model(tiny_config())
    settings: list[dict[str, Any]] = [
        {"temperature": 0.9},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9},
        {"temperature": 0.0},
    ]
    states = [sequence([2, 30 + row], 15, row, **each) for row, each in enumerate(settings)]
    run_together(Engine(model, 4, 40, decoding), {0: states[2:], 2: [states[1]], 5: [states[0]]})
    for row, state in enumerate(states):
        assert state.generated == alone(model, state, row)


def test_rows_of_a_batch_draw_with_consecutive_seeds(speaker: Gemma3) -> None:
    warm = SamplingSettings(temperature=0.9)
    together = rows(list(stream_tokens(speaker, PROMPTS, 10, NONE, warm, seed=7)))
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == rows(list(stream_tokens(speaker, [prompt], 10, NONE, warm, seed=7 + row)))[0]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_sequence_that_is_evicted_leaves_the_others_alone(decoding: Decoding) -> None:
    model = lively_model(tiny_config())
    states = [sequence(prompt, 12) for prompt in PROMPTS[1:]]
    engine = Engine(model, 3, 30, decoding)
    engine.insert(states)
    for _ in range(3):
        engine.step()
    engine.evict(states[1])
    while engine.sequences:
        assert states[1] not in engine.step()
    assert [len(state.generated) for state in states] == [12, 3, 12]
    for state, prompt in zip(states, PROMPTS[1:], strict=True):
        assert state.generated == greedily(model, prompt, 12)[: len(state.generated)]


def test_each_sequence_has_its_own_stop_tokens_and_limit(speaker: Gemma3) -> None:
    expected = greedily(speaker, PROMPTS[2], 12)
    states = [sequence(PROMPTS[2], 12), sequence(PROMPTS[2], 12, stop=expected[4]), sequence(PROMPTS[2], 3)]
    run_together(Engine(speaker, 3, 20), {0: states})
    assert [state.finish for state in states] == ["length", "stop", "length"]
    assert states[0].generated == expected
    assert states[1].generated == expected[: expected.index(expected[4]) + 1]
    assert states[2].generated == expected[:3]


def test_an_engine_refuses_more_than_it_was_made_for(speaker: Gemma3) -> None:
    engine = Engine(speaker, 2, 10)
    with pytest.raises(ValueError, match="1 sequences of up to 11 positions: the engine was made for 2 of 10"):
        engine.insert([sequence([2, 3], 10)])
    engine.insert([sequence([2], 10)])
    with pytest.raises(ValueError, match="3 sequences of up to 9 positions"):
        engine.insert([sequence([2], 9), sequence([3], 9)])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(speaker: Gemma3, seed: int) -> None:
    with pytest.raises(RecipeError, match=f"seed = {seed}: must be from 0"):
        next(stream_tokens(speaker, PROMPTS, 3, NONE, GREEDY, seed))


def events_of(model: Gemma3, tokenizer: Tokenizer, count: int = 50) -> list[Event]:
    return list(generate(model, tokenizer, "Once upon a time", max_new_tokens=count, seed=0))


def test_events_joined_are_the_decoded_tokens(speaker: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    for seed in range(5):
        events = list(generate(speaker, tiny_tokenizer, "Once", max_new_tokens=40, seed=seed))
        assert "".join(event.text for event in events) == tiny_tokenizer.decode([event.token for event in events])
        assert len({event.finish for event in events[:-1]} - {None}) == 0


@pytest.mark.parametrize("name", ["eos_id", "end_of_turn_id"])
def test_text_ends_at_an_end_token(
    tiny_tokenizer: Tokenizer, says: Callable[[Sequence[int]], Gemma3], name: str
) -> None:
    end = getattr(tiny_tokenizer, name)
    fox = tiny_tokenizer.encode("the fox")[1:]
    events = events_of(says([*fox, end, *fox]), tiny_tokenizer)
    assert [event.token for event in events] == [*fox, end]
    assert "".join(event.text for event in events) == "the fox"
    assert [event.finish for event in events] == [None] * len(fox) + ["stop"]
    assert end in stop_tokens(tiny_tokenizer)


def test_text_ends_at_the_limit(tiny_tokenizer: Tokenizer, says: Callable[[Sequence[int]], Gemma3]) -> None:
    fox = tiny_tokenizer.encode("fox")[-1]
    events = events_of(says([fox] * 9), tiny_tokenizer, count=4)
    assert [event.finish for event in events] == [None, None, None, "length"]


def test_an_end_at_the_limit_is_an_end(tiny_tokenizer: Tokenizer, says: Callable[[Sequence[int]], Gemma3]) -> None:
    assert [event.finish for event in events_of(says([100, 1]), tiny_tokenizer, count=2)] == [None, "stop"]


def test_incomplete_characters_are_held_back(
    tiny_tokenizer: Tokenizer, says: Callable[[Sequence[int]], Gemma3]
) -> None:
    unicorn = tiny_tokenizer.encode("\U0001f984")[1:]
    assert len(unicorn) == 4
    texts = [event.text for event in events_of(says([*unicorn, *unicorn[:2], 1]), tiny_tokenizer)]
    assert texts == ["", "", "", "\U0001f984", "", "", "\ufffd"], "what never became a character is shown at the end"


def test_asking_for_nothing_gives_nothing(speaker: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    assert events_of(speaker, tiny_tokenizer, count=0) == []


def test_generation_stays_within_the_positions_the_model_has(speaker: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    longest = speaker.config.max_position_embeddings
    prompt = "owl " * 30
    ids = tiny_tokenizer.encode(prompt)
    assert 30 < len(ids) < longest
    events = list(generate(parrot(lively_model(speaker.config), [100] * 99), tiny_tokenizer, prompt))
    assert len(ids) + len(events) == longest
    assert events[-1].finish == "length"


def test_prompt_longer_than_the_model_is_explained(speaker: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match=r"the prompt has \d+ tokens; this model's max_position_embeddings is 64"):
        encode_prompt(speaker, tiny_tokenizer, "an owl " * 64)


def test_empty_prompt_begins_with_bos_where_the_tokenizer_does(
    speaker: Gemma3, tiny_tokenizer: Tokenizer, says: Callable[[Sequence[int]], Gemma3]
) -> None:
    assert encode_prompt(speaker, tiny_tokenizer, "") == [2]
    assert len(list(islice(generate(says([100, 101, 102]), tiny_tokenizer, ""), 3))) == 3


def test_empty_prompt_is_explained_where_no_text_begins_with_bos(
    speaker: Gemma3, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "encode", lambda text: [])
    with pytest.raises(ModelError, match="the prompt is empty, and this model's tokenizer begins no text with bos"):
        list(generate(speaker, tiny_tokenizer, ""))


def test_complete_returns_prompts_with_their_continuations(speaker: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    prompts = ["Once upon a time", "The", ""]
    texts = complete(speaker, tiny_tokenizer, prompts, 12, GREEDY)
    for prompt, text in zip(prompts, texts, strict=True):
        events = generate(speaker, tiny_tokenizer, prompt, max_new_tokens=12, temperature=0)
        alone = tiny_tokenizer.decode([*tiny_tokenizer.encode(prompt), *(event.token for event in events)])
        assert text == alone
        assert text.startswith(prompt)


def test_complete_leaves_end_tokens_out(tiny_tokenizer: Tokenizer, says: Callable[[Sequence[int]], Gemma3]) -> None:
    fox = tiny_tokenizer.encode(" fox")[1:]
    assert complete(says([*fox, 1]), tiny_tokenizer, ["the", "a"], 9, GREEDY) == ["the fox", "a fox"]


def test_complete_of_nothing_is_nothing(speaker: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    assert complete(speaker, tiny_tokenizer, [], 9, GREEDY) == []
