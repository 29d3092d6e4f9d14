import random

import pytest
import torch

from gemmule.evaluate.choices import _ContextCache, score_choices
from gemmule.evaluate.log_probabilities import score_continuations
from gemmule.model.gemma3 import Gemma3
from tiny import greatest_difference, lively_model, some_tokens, tiny_config


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return lively_model(tiny_config())


def drawn_pairs(seed: int) -> list[tuple[list[int], list[int]]]:
    """Contexts from one token to many windows long, each with one to four continuations, shuffled."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(48) for _ in range(length)]

    contexts = [ids(length) for length in (1, 2, 3, 7, 20, 21, 40)]
    pairs = [(context, ids(draw.randint(1, 15))) for context in contexts for _ in range(draw.randint(1, 4))]
    draw.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
def test_a_context_that_is_read_once_changes_nothing(model: Gemma3, batch_tokens: int) -> None:
    pairs = drawn_pairs(seed=batch_tokens)
    apart = [score_continuations(model, [pair])[0] for pair in pairs]
    together = score_choices(model, pairs, batch_tokens)
    assert [score.log_probability for score in together] == pytest.approx(
        [score.log_probability for score in apart], abs=1e-4
    )
    assert [score.is_greedy for score in together] == [score.is_greedy for score in apart]


def test_what_the_model_would_say_is_greedy(model: Gemma3) -> None:
    context = [1, 2, 3, 4, 5, 6, 7]
    scores = score_choices(model, [(context, [token]) for token in range(48)], 10_000)
    assert [score.is_greedy for score in scores].count(True) == 1
    likeliest = max(range(48), key=lambda token: scores[token].log_probability)
    assert scores[likeliest].is_greedy


def test_an_empty_continuation_costs_nothing(model: Gemma3) -> None:
    scores = score_choices(model, [([1, 2], []), ([1, 2], [3])], 100)
    assert scores[0].log_probability == 0.0
    assert scores[1] == score_continuations(model, [([1, 2], [3])])[0]


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_each_continuation_sees_its_own_context_and_no_padding(window: int) -> None:
    model = lively_model(tiny_config(sliding_window=window))
    contexts, padding, counts = some_tokens(model.config, rows=3, length=9), torch.tensor([[0], [4], [8]]), [2, 1, 3]
    positions, cache = torch.arange(9) - padding, _ContextCache(model.config)
    continuations = some_tokens(model.config, rows=6, length=4, seed=2)
    with torch.no_grad():
        model(contexts, positions, torch.where(positions < 0, -1, 0), cache)
        cache.repeat(counts)
        assert cache.next_positions.tolist() == [9, 9, 5, 1, 1, 1]
        logits = model(continuations, cache.next_positions[:, None] + torch.arange(4), None, cache)
        for own, row, continuation in zip(logits, (0, 0, 1, 2, 2, 2), continuations, strict=True):
            text = torch.cat((contexts[row, int(padding[row]) :], continuation))
            assert greatest_difference(own, model(text[None])[0, -4:]) < 1e-4
