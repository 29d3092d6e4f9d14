import random

import pytest

from gemmule.evaluate.choices import score_choices
from gemmule.evaluate.log_probabilities import score_continuations
from gemmule.model.gemma3 import Gemma3
from tiny import lively_model, tiny_config


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
