from collections.abc import Callable, Sequence
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmule.errors import ModelError
from gemmule.generate.engine import Event, complete, encode_prompt, generate, stop_tokens, stream_tokens
from gemmule.generate.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3, Readout
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
        tokens: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor, cache: object, readout: Readout
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


def test_empty_prompt_begins_with_bos_where_the_tokenizer_does(speaker: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    assert encode_prompt(speaker, tiny_tokenizer, "") == [2]
    assert len(list(islice(generate(speaker, tiny_tokenizer, ""), 3))) == 3


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
