import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemmule.errors import ModelError, RecipeError
from gemmule.inference.sampling import RULES, SamplingSettings, draw, probabilities
from gemmule.settings import check_recipe

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
def test_top_p_after_top_k_equals_top_p_over_the_whole_vocabulary(seed: int, k: int, p: float) -> None:
    logits = torch.randn(2, 30, generator=generator(seed)).double() * 3
    few = RULES["top_k"](logits, SamplingSettings(top_k=k))
    quick, slow = SamplingSettings(top_k=k, top_p=p), SamplingSettings(top_p=p)
    assert torch.equal(RULES["top_p"](few, quick), RULES["top_p"](few, slow))


TIES = [[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0, 3.0], [0.0] * 8, [2.0, 1.0, 0.0, -1.0, -1.0, -1.0, -1.0, -2.0]]


def kept(**settings: Any) -> list[list[int]]:
    chosen = probabilities(torch.tensor(TIES), SamplingSettings(**settings))
    return [row.nonzero()[:, 0].tolist() for row in chosen]


def test_of_equally_likely_tokens_the_lowest_ids_are_kept() -> None:
    assert kept(top_k=1) == [[1], [0], [0]]
    assert kept(top_k=2) == [[1, 3], [0, 1], [0, 1]]
    assert kept(top_k=5) == [[1, 2, 3, 4, 7], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert kept(top_p=0.3) == [[1, 3], [0, 1, 2], [0]]
    assert kept(top_k=7, top_p=0.3) == [[1, 3], [0, 1, 2], [0]]
    assert kept(top_k=7, top_p=0.85) == [[1, 2, 3, 4, 7], [0, 1, 2, 3, 4, 5], [0, 1, 2]]


def test_min_p_keeps_or_drops_equally_likely_tokens_together() -> None:
    assert kept(min_p=0.9) == [[1, 3, 7], list(range(8)), [0]]
    assert kept(min_p=0.3) == [[1, 2, 3, 4, 5, 7], list(range(8)), [0, 1]]


@given(seed=st.integers(0, 999), k=st.integers(1, 12), steps=st.sampled_from([1, 2, 8]))
def test_top_k_keeps_exactly_k(seed: int, k: int, steps: int) -> None:
    logits = torch.randn(3, 10, generator=generator(seed)).mul(steps).round().div(steps).bfloat16()
    chosen = probabilities(logits, SamplingSettings(top_k=k))
    assert (chosen > 0).sum(-1).tolist() == [min(k, 10)] * 3
    greedy = SamplingSettings(temperature=0)
    assert torch.equal(draw(logits, SamplingSettings(top_k=1), generator(seed)), draw(logits, greedy, generator()))


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


def test_every_uniform_number_draws_a_token_that_is_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_rows_draw_different_numbers() -> None:
    drawn = draw(torch.zeros(64, 1000), SamplingSettings(), generator())
    assert len(set(drawn.tolist())) > 50


def test_low_precision_logits_still_give_each_token_its_chance() -> None:
    """The running sum over 50,000 equal tokens has only a few hundred steps in bf16."""
    drawn = draw(torch.zeros(200, 50_000, dtype=torch.bfloat16), SamplingSettings(), generator())
    assert len(set(drawn.tolist())) > 190
    assert drawn.double().mean().item() == pytest.approx(25_000, rel=0.2)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.inf, math.nan)),
        *(("top_k", value) for value in (-1, 1.5)),
        *(("top_p", value) for value in (0.0, 1.1, math.nan)),
        *(("min_p", value) for value in (1.0, -0.1, math.nan)),
    ],
)
def test_impossible_setting_is_refused(setting: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"{setting} = {json.dumps(value)}: must be a "):
        check_recipe({setting: value}, SamplingSettings, "request")


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("logits", [[NAN] * 4, [0.0, 1.0, NAN, 2.0], [0.0, INF, 1.0], [NAN, INF, -INF], [-INF] * 5])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, *NARROW.values(), {"temperature": 0.7, "min_p": 0.1}])
def test_logits_that_are_not_finite_are_refused(logits: list[float], settings: dict[str, Any]) -> None:
    """Also where they are those of one row of several."""
    rows = torch.tensor([[1.0] * len(logits), logits])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with pytest.raises(
            ModelError, match=r"the model's logits are not finite: its weights .* `gemmule doctor MODEL`"
        ):
            draw(rows.to(dtype), SamplingSettings(**settings), generator())


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-45, 1e-38, 1e-30])
@pytest.mark.parametrize("flushed", [False, True])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float, flushed: bool) -> None:
    logits = torch.tensor([[10.0, 20.0, 30.0, -INF], [3e38, 2e38, -3e38, 0.0], [0.0, 1e-5, 0.0, -1e-5]])
    settings = SamplingSettings(temperature=temperature)
    torch.set_flush_denormal(flushed)
    try:
        assert draw(logits, settings, generator()).tolist() == [2, 0, 1]
        assert probabilities(logits, settings).argmax(-1).tolist() == [2, 0, 1]
    finally:
        torch.set_flush_denormal(False)


def test_a_flat_distribution_stays_flat() -> None:
    assert probabilities(torch.zeros(1, 8), SamplingSettings(min_p=0.9)).tolist() == [[1 / 8] * 8]
    assert math.isclose(probabilities(torch.zeros(1, 8), SamplingSettings(top_p=0.5))[0].max().item(), 1 / 4)
