from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmule.errors import ModelError, RecipeError
from gemmule.inference import runners
from gemmule.inference.engine import Engine, complete, encode_prompt, generate, reply_to_all, stop_tokens, stream_tokens
from gemmule.inference.native.library import load_library
from gemmule.inference.requests import Event, Request, SequenceState
from gemmule.inference.runners import Decoding, static_step
from gemmule.inference.sampling import Query as LogProbabilityQuery
from gemmule.inference.sampling import SamplingSettings, log_probabilities
from gemmule.model.gemma3 import Gemma3, OutputHead
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, shallow_config

GREEDY = SamplingSettings(temperature=0)
NONE: frozenset[int] = frozenset()
PROMPTS = [[2, 40, 41, 42, 43, 44, 45, 46, 47, 11, 12, 13, 14], [2], [2, 30, 31], [2, 20, 21, 22, 23]]


@pytest.fixture(scope="module")
def speaker(tiny_tokenizer: Tokenizer) -> Gemma3:
    """A lively model of the tiny vocabulary; what it says is nonsense."""
    return lively_model(shallow_config(vocab_size=tiny_tokenizer.vocab_size))


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
        hidden = torch.zeros(*tokens.shape, model.config.vocab_size)
        hidden[:, -1, next(said)] = 1e9
        return output_head(hidden, torch.eye(model.config.vocab_size))

    model.forward = forward  # type: ignore[method-assign, assignment]
    return model


@pytest.fixture
def says(tiny_tokenizer: Tokenizer) -> Callable[[Sequence[int]], Gemma3]:
    return lambda script: parrot(lively_model(shallow_config(vocab_size=tiny_tokenizer.vocab_size)), script)


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
    """Run the static step of the compiled runner without compiling it."""
    monkeypatch.setattr(runners, "_compiled_step", lambda tuned: static_step)
    monkeypatch.setattr(runners, "reason_not_to_compile", lambda device: None)


def request(prompt: Sequence[int], count: int, seed: int = 0, stop: int = -1, **sampling: Any) -> Request:
    chosen = SamplingSettings(**sampling) if sampling else GREEDY
    return Request(tuple(prompt), count, chosen, seed, stops=frozenset({stop}))


def run_together(engine: Engine, arrivals: dict[int, list[Request]]) -> list[SequenceState]:
    """Step until all are finished; requests are submitted at the step of their number. Return their sequences."""
    sequences: list[SequenceState] = []
    for number in range(200):
        for each in arrivals.get(number, ()):
            sequences += engine.submit(each)
        engine.step()
    assert engine.idle
    return sequences


JOINING = [[2, 40, 41, 42, 43, 44, 45, 46, 47, 11], [2], [2, 30, 31], [2, 20, 21, 22], [9, 8, 7, 6, 5, 4], [3, 1]]
LIMITS = [12, 30, 1, 7, 20, 9]


@cache
def each_alone(window: int) -> tuple[Gemma3, list[list[int]]]:
    """Return a model, and its replies to each prompt without a cache."""
    model = lively_model(shallow_config(sliding_window=window))
    return model, [greedily(model, prompt, limit) for prompt, limit in zip(JOINING, LIMITS, strict=True)]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("window", [1, 3, 5, 64])
def test_sequences_that_join_and_leave_generate_what_each_does_alone(window: int, decoding: Decoding) -> None:
    model, alone = each_alone(window)
    asked = [request(prompt, limit) for prompt, limit in zip(JOINING, LIMITS, strict=True)]
    engine = Engine(model, 4, 40, decoding)
    states = run_together(engine, {0: asked[:2], 3: asked[2:4], 12: [asked[4]], 13: [asked[5]]})
    assert [state.generated for state in states] == alone
    assert {state.finish for state in states} == {"length"}
    (again,) = run_together(engine, {0: [request(JOINING[0], 5)]})
    assert again.generated == states[0].generated[:5], "an engine that ran empty can be filled again"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("decoding", DECODINGS)
def test_draws_depend_on_the_seed_of_the_sequence_alone(decoding: Decoding) -> None:
    model = lively_model(shallow_config())
    settings: list[dict[str, Any]] = [
        {"temperature": 0.9},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9},
        {"temperature": 0.0},
    ]
    asked = [request([2, 30 + row], 15, row, **each) for row, each in enumerate(settings)]
    states = run_together(Engine(model, 4, 40, decoding), {0: asked[2:], 2: [asked[1]], 5: [asked[0]]})
    alone = [reply_to_all(model, [each], "plain")[0] for each in (*asked[2:], asked[1], asked[0])]
    assert [state.generated for state in states] == alone


def test_rows_of_a_batch_draw_with_consecutive_seeds(speaker: Gemma3) -> None:
    warm = SamplingSettings(temperature=0.9)
    together = rows(list(stream_tokens(speaker, PROMPTS, 10, NONE, warm, seed=7)))
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == rows(list(stream_tokens(speaker, [prompt], 10, NONE, warm, seed=7 + row)))[0]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_sequence_that_is_cancelled_leaves_the_others_alone(decoding: Decoding) -> None:
    model = lively_model(shallow_config())
    engine = Engine(model, 3, 30, decoding)
    states = [engine.submit(request(prompt, 12))[0] for prompt in PROMPTS[1:]]
    for _ in range(3):
        engine.step()
    engine.cancel([states[1]])
    while not engine.idle:
        assert states[1] not in {state for state, _ in engine.step()}
    assert [len(state.generated) for state in states] == [12, 3, 12]
    assert [state.finish for state in states] == ["length", "cancelled", "length"]
    for state, prompt in zip(states, PROMPTS[1:], strict=True):
        assert state.generated == greedily(model, prompt, 12)[: len(state.generated)]


def test_each_sequence_has_its_own_stop_tokens_and_limit(speaker: Gemma3) -> None:
    expected = greedily(speaker, PROMPTS[2], 12)
    asked = [request(PROMPTS[2], 12), request(PROMPTS[2], 12, stop=expected[4]), request(PROMPTS[2], 3)]
    states = run_together(Engine(speaker, 3, 20), {0: asked})
    assert [state.finish for state in states] == ["length", "stop", "length"]
    assert states[0].generated == expected
    assert states[1].generated == expected[: expected.index(expected[4]) + 1]
    assert states[2].generated == expected[:3]


def test_no_stop_token_is_drawn_before_the_minimum(speaker: Gemma3) -> None:
    usual = greedily(speaker, PROMPTS[2], 12)
    stops = frozenset(usual)
    (state,) = run_together(
        Engine(speaker, 1, 30), {0: [Request(tuple(PROMPTS[2]), 20, GREEDY, 0, stops=stops, min_new_tokens=7)]}
    )
    assert not stops & {*state.generated[:7]}
    assert len(state.generated) >= 8


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("decoding", DECODINGS)
def test_log_probabilities_are_those_of_the_model_before_any_rule(decoding: Decoding) -> None:
    model = lively_model(shallow_config())
    prompt = tuple(range(5, 40))
    asked = Request(
        prompt, 9, SamplingSettings(temperature=3, top_k=4, repetition_penalty=1.5), 1,
        log_probabilities=3, prompt_log_probabilities=2,
    )  # fmt: skip
    engine = Engine(model, 2, 60, decoding)
    run_together(engine, {0: [request(prompt, 2)]})
    (state,), events = engine.submit(asked), []
    while not engine.idle:
        events += [event for _, event in engine.step() if event]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *state.generated]]))[0]
    ids = [*prompt[1:], *state.generated]
    tops = [2] * (len(prompt) - 1) + [3] * 9
    queries = [LogProbabilityQuery(row, token, top) for row, (token, top) in enumerate(zip(ids, tops, strict=True))]
    expected = log_probabilities(logits, queries)
    found = [*state.prompt_log_probabilities, *(event.log_probabilities for event in events)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert ours.token == pytest.approx(theirs.token, abs=1e-4)
        assert [token for token, _ in ours.likeliest] == [token for token, _ in theirs.likeliest]


def test_a_prompt_can_be_scored_without_a_reply(speaker: Gemma3) -> None:
    engine = Engine(speaker, 1, 20)
    (state,) = engine.submit(Request((2, 30, 31), 0, GREEDY, 0, prompt_log_probabilities=0))
    while not engine.idle:
        engine.step()
    assert len(state.prompt_log_probabilities) == 2
    assert (state.generated, state.finish) == ([], "length")


def test_an_engine_refuses_more_than_it_was_made_for(speaker: Gemma3) -> None:
    engine = Engine(speaker, 2, 10)
    with pytest.raises(ValueError, match="1 sequences of up to 11 positions: the engine was made for 2 of 10"):
        engine.submit(request([2, 3], 10))
    engine.submit(request([2], 10))
    with pytest.raises(ValueError, match="3 sequences of up to 9 positions"):
        engine.submit(Request((2,), 9, samples=3))
    with pytest.raises(ValueError, match="need an engine with a tokenizer"):
        engine.submit(Request((2,), 9, stop_strings=("x",)))


def test_a_sequence_whose_logits_are_not_finite_fails_alone() -> None:
    model = lively_model(shallow_config())
    with torch.no_grad():
        model.embedding.weight[7] = 1e38  # finite, but what follows from it is not
    engine = Engine(model, 2, 20)
    states = run_together(engine, {0: [request([3, 7], 5), request([3, 8], 5)]})
    assert states[0].finish == "error"
    assert "logits are not finite" in str(states[0].error)


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
    for prompt in ("the", "a"):
        assert complete(says([*fox, 1]), tiny_tokenizer, [prompt], 9, GREEDY) == [f"{prompt} fox"]


def test_complete_of_nothing_is_nothing(speaker: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    assert complete(speaker, tiny_tokenizer, [], 9, GREEDY) == []
