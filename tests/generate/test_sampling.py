import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemmule.errors import RecipeError
from gemmule.generate.sampling import RULES, SamplingSettings, draw, probabilities
from gemmule.recipe import check_recipe

# A setting for each rule that narrows the choice, far from neutral.
NARROW: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.5},
}
LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()[None]  # probabilities, out of order


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chances(**settings: Any) -> list[float]:
    return probabilities(LOGITS, SamplingSettings(**settings))[0].tolist()


def test_every_rule_has_a_test() -> None:
    assert list(NARROW) == list(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_neutral_settings_change_nothing(rule: str) -> None:
    logits = torch.randn(3, 50, generator=generator())
    assert torch.equal(RULES[rule](logits, SamplingSettings()), logits)


@pytest.mark.parametrize("rule", RULES)
def test_rows_are_independent(rule: str) -> None:
    logits, settings = torch.randn(4, 50, generator=generator()) * 3, SamplingSettings(**NARROW[rule])
    together = RULES[rule](logits, settings)
    assert not torch.equal(together, logits)
    for row in range(4):
        assert torch.equal(together[row : row + 1], RULES[rule](logits[row : row + 1], settings))


@pytest.mark.parametrize("rule", RULES)
def test_rules_leave_their_input_as_it_was(rule: str) -> None:
    logits = LOGITS.clone()
    RULES[rule](logits, SamplingSettings(**NARROW[rule]))
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        # Squared and divided by their sum: 0.01 + 0.16 + 0.04 + 0.09 = 0.3.
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        # 0.4 alone does not reach 0.6, 0.4 + 0.3 does.
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),
        ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3]),
        # At least half of 0.4: 0.2 is just in.
        ({"min_p": 0.49}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 0.51}, [0, 4 / 7, 0, 3 / 7]),
        # In this order: at temperature 0.5 the likeliest two are 16 : 9; 16/25 alone reaches 0.6.
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.7}, [0, 16 / 25, 0, 9 / 25]),
    ],
)
def test_probabilities_are_exact(settings: dict[str, Any], expected: list[float]) -> None:
    assert chances(**settings) == pytest.approx(expected, abs=1e-6)


@given(
    settings=st.builds(
        SamplingSettings,
        temperature=st.floats(0.01, 100),
        top_k=st.integers(0, 12),
        top_p=st.floats(0.001, 1),
        min_p=st.floats(0, 0.999),
    ),
    seed=st.integers(0, 99),
)
def test_the_likeliest_is_never_ruled_out(settings: SamplingSettings, seed: int) -> None:
    logits = torch.randn(2, 10, generator=generator(seed)).double() * 5
    chosen = probabilities(logits, settings)
    assert torch.equal(chosen.argmax(-1), logits.argmax(-1))
    assert chosen.sum(-1).tolist() == pytest.approx([1, 1])
    order = logits.argsort(dim=-1)
    assert (chosen.gather(-1, order).diff() >= 0).all(), "a likelier token is never less likely to be drawn"


@given(st.integers(0, 99), st.integers(1, 40), st.floats(0.01, 0.99))
def test_top_p_of_few_words_is_top_p_of_all_where_the_others_are_ruled_out(seed: int, k: int, p: float) -> None:
    logits = torch.randn(2, 30, generator=generator(seed)).double() * 3
    few = RULES["top_k"](logits, SamplingSettings(top_k=k))
    quick, slow = SamplingSettings(top_k=k, top_p=p), SamplingSettings(top_p=p)
    assert torch.equal(RULES["top_p"](few, quick), RULES["top_p"](few, slow))


def test_draws_follow_the_distribution() -> None:
    count = 20_000
    settings = SamplingSettings(temperature=0.5)
    drawn = draw(LOGITS.expand(count, -1), settings, generator())
    expected = torch.tensor(chances(temperature=0.5)) * count
    surprise = ((drawn.bincount(minlength=4) - expected) ** 2 / expected).sum().item()
    assert surprise < 16.3, "chi-square with 3 degrees of freedom exceeds this once in a thousand"
    assert surprise > 0.02, "and is rarely as regular as this"


@given(st.integers(0, 10_000))
def test_what_is_ruled_out_is_never_drawn(seed: int) -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(16, -1)
    drawn = draw(logits, SamplingSettings(), generator(seed))
    assert set(drawn.tolist()) <= {1, 3}


def test_every_lot_hits_a_token_that_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest number that torch.rand can return."""
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    for lot, token in ((0.0, 1), (1 - 2**-53, 2)):
        monkeypatch.setattr(torch, "rand", lambda *_, lot=lot, **__: torch.tensor([[lot]], dtype=torch.float64))
        assert draw(logits, SamplingSettings(), generator()).tolist() == [token]


def test_temperature_zero_takes_the_likeliest_whatever_the_seed() -> None:
    logits = torch.randn(5, 40, generator=generator())
    for seed in range(5):
        assert torch.equal(draw(logits, SamplingSettings(temperature=0, top_k=3), generator(seed)), logits.argmax(-1))


def test_same_seed_draws_the_same_and_leaves_the_global_generator_alone() -> None:
    logits = torch.randn(64, 40, generator=generator())
    before = torch.get_rng_state()
    one, same, other = (draw(logits, SamplingSettings(), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_draw_different_lots() -> None:
    drawn = draw(torch.zeros(64, 1000), SamplingSettings(), generator())
    assert len(set(drawn.tolist())) > 50


def test_low_precision_logits_still_give_each_token_its_chance() -> None:
    """The running sum over 50,000 equal tokens has only a few hundred steps in bf16."""
    drawn = draw(torch.zeros(200, 50_000, dtype=torch.bfloat16), SamplingSettings(), generator())
    assert len(set(drawn.tolist())) > 190
    assert drawn.double().mean().item() == pytest.approx(25_000, rel=0.2)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0)],
)
def test_impossible_setting_is_refused(setting: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"{setting} = {value}: value should be"):
        check_recipe({setting: value}, SamplingSettings, "request")


def test_a_flat_distribution_stays_flat() -> None:
    assert probabilities(torch.zeros(1, 8), SamplingSettings(min_p=0.9)).tolist() == [[1 / 8] * 8]
    assert math.isclose(probabilities(torch.zeros(1, 8), SamplingSettings(top_p=0.5))[0].max().item(), 1 / 4)
