import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemmule.errors import ModelError, RecipeError
from gemmule.inference.sampling import (
    INVALID,
    NO_CANDIDATE,
    RULES,
    History,
    Query,
    Row,
    SamplingSettings,
    draw_rows,
    log_probabilities,
    probabilities,
    refuse_invalid,
    uniform,
)
from gemmule.settings import check_recipe, read_recipe, write_recipe

# A setting for each rule, far from neutral.
NARROW: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {3: 2.5, 1: -100}},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": -0.5},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.5},
}
LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()[None]  # probabilities, out of order
PROMPT, REPLY = (1, 2), (2, 0, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(logits: torch.Tensor, settings: SamplingSettings, numbers: torch.Generator) -> torch.Tensor:
    """Draw a token per row with numbers from a generator; raise what cannot be drawn."""
    lots = torch.rand(len(logits), generator=numbers, dtype=torch.float64).tolist()
    drawn = draw_rows(logits, [Row(settings, uniform=lot) for lot in lots])
    refuse_invalid(drawn.tolist())
    return drawn


def chances(**settings: Any) -> list[float]:
    return probabilities(LOGITS, row(**settings))[0].tolist()


def row(**settings: Any) -> Row:
    return Row(SamplingSettings(**settings), PROMPT, REPLY)


def test_every_rule_has_a_test() -> None:
    assert list(NARROW) == list(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_neutral_settings_change_nothing(rule: str) -> None:
    logits = torch.randn(3, 50, generator=generator())
    assert torch.equal(RULES[rule](logits, row()), logits)


@pytest.mark.parametrize("rule", RULES)
def test_rows_are_independent(rule: str) -> None:
    logits, narrow = torch.randn(4, 50, generator=generator()) * 3, row(**NARROW[rule])
    together = RULES[rule](logits, narrow)
    assert not torch.equal(together, logits)
    for one, alone in zip(together, logits, strict=True):
        assert torch.equal(one, RULES[rule](alone, narrow))


@pytest.mark.parametrize("rule", RULES)
def test_rules_leave_their_input_as_it_was(rule: str) -> None:
    logits = LOGITS.clone()
    RULES[rule](logits, row(**NARROW[rule]))
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
    chosen = probabilities(logits, Row(settings))
    assert torch.equal(chosen.argmax(-1), logits.argmax(-1))
    assert chosen.sum(-1).tolist() == pytest.approx([1, 1])
    order = logits.argsort(dim=-1)
    assert (chosen.gather(-1, order).diff() >= 0).all(), "a likelier token is never less likely to be drawn"


@given(st.integers(0, 99), st.integers(1, 40), st.floats(0.01, 0.99))
def test_top_p_after_top_k_equals_top_p_over_the_whole_vocabulary(seed: int, k: int, p: float) -> None:
    logits = torch.randn(2, 30, generator=generator(seed)).double() * 3
    few = RULES["top_k"](logits, row(top_k=k))
    quick, slow = row(top_k=k, top_p=p), row(top_p=p)
    assert torch.equal(RULES["top_p"](few, quick), RULES["top_p"](few, slow))


TIES = [[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0, 3.0], [0.0] * 8, [2.0, 1.0, 0.0, -1.0, -1.0, -1.0, -1.0, -2.0]]


def kept(**settings: Any) -> list[list[int]]:
    chosen = probabilities(torch.tensor(TIES), row(**settings))
    return [each.nonzero()[:, 0].tolist() for each in chosen]


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
    chosen = probabilities(logits, row(top_k=k))
    assert (chosen > 0).sum(-1).tolist() == [min(k, 10)] * 3
    greedy = SamplingSettings(temperature=0)
    assert torch.equal(draw(logits, SamplingSettings(top_k=1), generator(seed)), draw(logits, greedy, generator()))


def test_draws_follow_the_distribution() -> None:
    count = 5000
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


def test_every_uniform_number_draws_a_token_that_is_not_masked() -> None:
    """The smallest and the largest number."""
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    for lot, token in ((0.0, 1), (1 - 2**-53, 2)):
        assert draw_rows(logits, [Row(SamplingSettings(), uniform=lot)]).tolist() == [token]


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
        *(("repetition_penalty", value) for value in (0.0, -1.0, math.inf, math.nan)),
        *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan)),
        *(("logit_bias", value) for value in (1.0, [[1, 2.0]], {"1": 101}, {"1": math.nan}, {"-1": 0}, {"a": 1})),
        *(("logit_bias", value) for value in ({"1": "2"}, {"1": True}, {str(2**31): 1}, {"1.0": 1})),
    ],
)
def test_impossible_setting_is_refused(setting: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"{setting} = {re.escape(json.dumps(value))}: must be a "):
        check_recipe({setting: value}, SamplingSettings, "request")


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("logits", [[NAN] * 4, [0.0, 1.0, NAN, 2.0], [0.0, INF, 1.0], [NAN, INF, -INF], [-INF] * 5])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, *list(NARROW.values())[4:], {"temperature": 0.7, "min_p": 0.1}]
)
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
        assert probabilities(logits, Row(settings)).argmax(-1).tolist() == [2, 0, 1]
    finally:
        torch.set_flush_denormal(False)


def test_a_flat_distribution_stays_flat() -> None:
    assert probabilities(torch.zeros(1, 8), row(min_p=0.9)).tolist() == [[1 / 8] * 8]
    assert math.isclose(probabilities(torch.zeros(1, 8), row(top_p=0.5))[0].max().item(), 1 / 4)


def test_biases_are_kept_in_order_and_written_as_a_table(tmp_path: Path) -> None:
    settings = row(logit_bias={30: 1, 7: -2.5}, top_k=3).settings
    assert settings.logit_bias == ((7, -2.5), (30, 1.0))
    assert hash(settings) == hash(row(logit_bias={7: -2.5, 30: 1}, top_k=3).settings)
    assert settings.replace(top_k=4).logit_bias == settings.logit_bias
    write_recipe(settings, tmp_path / "sampling.toml", "a note")
    assert "[logit_bias]\n7 = -2.5\n30 = 1.0\n" in (tmp_path / "sampling.toml").read_text()
    assert read_recipe(tmp_path / "sampling.toml", SamplingSettings) == settings
    added = read_recipe(tmp_path / "sampling.toml", SamplingSettings, ["logit_bias={9=5}"])
    assert added.logit_bias == ((7, -2.5), (9, 5.0), (30, 1.0))


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    settings = SamplingSettings(logit_bias=((7, 1), (30, 1)))
    settings.check_vocabulary(31)
    with pytest.raises(RecipeError, match=r"logit_bias: there is no token 30: the model's vocabulary ends at 29"):
        settings.check_vocabulary(30)


def adjusted(logits: list[float], prompt: list[int], reply: list[int], **settings: Any) -> list[float]:
    known, narrow = torch.tensor(logits), Row(SamplingSettings(**settings), prompt, reply)
    for name in list(RULES)[:4]:
        known = RULES[name](known, narrow)
    return known.tolist()


def test_penalties_are_those_of_their_definitions() -> None:
    logits, prompt, reply = [2.0, -1.0, 4.0, 0.5, 3.0], [0, 1, 1], [2, 1, 2, 2]
    # Hugging Face's RepetitionPenaltyLogitsProcessor: once per token, however often it occurs, in prompt and reply.
    assert adjusted(logits, prompt, reply, repetition_penalty=2) == [1, -2, 2, 0.5, 3]
    assert adjusted(logits, prompt, reply, repetition_penalty=0.5) == [4, -0.5, 8, 0.5, 3]
    # OpenAI's: of the reply alone; logit - count * frequency_penalty - (count > 0) * presence_penalty.
    assert adjusted(logits, prompt, reply, presence_penalty=0.5) == [2, -1.5, 3.5, 0.5, 3]
    assert adjusted(logits, prompt, reply, frequency_penalty=0.5) == [2, -1.5, 2.5, 0.5, 3]
    assert adjusted(logits, prompt, reply, logit_bias={1: -100, 3: 2}) == [2, -101, 4, 2.5, 3]
    # In this order: (-1 + 3) / 2 - 1 - 0.5.
    every = {"logit_bias": {1: 3}, "repetition_penalty": 2, "presence_penalty": 1, "frequency_penalty": 0.5}
    assert adjusted(logits, prompt, reply, **every)[1] == -0.5


def test_a_history_counts_token_by_token_what_it_counts_at_once() -> None:
    grown = History([5, 3, 5])
    for token in (9, 3, 9):
        grown.append(token)
    whole = History([5, 3, 5], [9, 3, 9])
    for history in (grown, whole):
        assert history.tokens.tolist() == [5, 3, 9]
        assert history.counts.tolist() == [0, 1, 2]


def test_a_row_without_penalties_keeps_no_history() -> None:
    assert row(top_k=3, logit_bias={1: 1}).history is None
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        narrow = row(**NARROW[name])
        narrow.append(7)
        assert narrow.history is not None
        assert narrow.history.tokens[-1] == 7


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300])
def test_no_penalty_makes_a_logit_infinite(penalty: float) -> None:
    logits = torch.tensor([[3e38, -3e38, 1.0, 0.0, -INF, -1e-40]])
    narrow = Row(SamplingSettings(repetition_penalty=penalty, frequency_penalty=2, presence_penalty=-2), range(6), [1])
    changed = probabilities(logits.double(), narrow)
    assert changed.isfinite().all()
    assert changed[0, 4] == 0, "what the model excludes stays excluded"


def test_the_number_of_a_draw_is_a_pure_function() -> None:
    """Fixed for good, so that a seed gives the same text on every machine and in every version."""
    assert [uniform(0, 0, 0), uniform(1, 2, 3), uniform(2**64 - 1, 2**64 - 1, 2**64 - 1)] == [
        0.26590024653188404,
        0.04235310591377195,
        0.12115228653039622,
    ]
    numbers = [uniform(seed, sample, index) for seed in range(16) for sample in range(16) for index in range(16)]
    assert len(set(numbers)) == 4096
    assert all(0 <= number < 1 and (number * 2**53).is_integer() for number in numbers)
    assert sum(numbers) / 4096 == pytest.approx(0.5, abs=0.02)
    for outside in ((-1, 0, 0), (0, 2**64, 0)):
        with pytest.raises(OverflowError):
            uniform(*outside)


def test_uniform_numbers_divide_the_line_by_probability() -> None:
    """Probabilities 0.1, 0.4, 0.2 and 0.3, in the order of ids."""
    numbers = [0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 1 - 2**-53]
    rows = [Row(SamplingSettings(), uniform=number) for number in numbers]
    assert draw_rows(LOGITS.expand(len(numbers), -1), rows).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_excluded_tokens_are_not_drawn() -> None:
    numbers = [index / 16 for index in range(16)]
    for temperature in (0, 1):
        settings = SamplingSettings(temperature=temperature, logit_bias=((1, 100),))
        rows = [Row(settings, excluded=frozenset({1, 3}), uniform=number) for number in numbers]
        drawn = draw_rows(LOGITS.expand(16, -1), rows).tolist()
        assert set(drawn) == ({2} if temperature == 0 else {0, 2})


def bitmask(tokens: set[int], vocabulary: int) -> torch.Tensor:
    words = [
        sum(1 << (token % 32) for token in tokens if token // 32 == word) for word in range((vocabulary + 31) // 32)
    ]
    return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32)


def test_a_grammar_allows_the_tokens_of_its_bits() -> None:
    tokens = {0, 5, 31, 32, 63, 64, 69}
    rows = [Row(SamplingSettings(), allowed=bitmask(tokens, 70), uniform=index / 200) for index in range(200)]
    assert set(draw_rows(torch.zeros(200, 70), rows).tolist()) == tokens


@pytest.mark.parametrize(
    "allowed", [torch.zeros(2, dtype=torch.int32), torch.zeros(3), torch.zeros(6, dtype=torch.int32)[::2]]
)
def test_a_bitmask_of_another_form_is_refused(allowed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be int32 \(3,\), contiguous"):
        draw_rows(torch.zeros(1, 70), [Row(SamplingSettings(), allowed=allowed)])


def test_a_row_that_nothing_is_left_of_is_named_and_refused() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, NAN, 2.0], [0.0, 1.0, 2.0]])
    rows = [Row(SamplingSettings(), excluded=(0, 1)), Row(SamplingSettings(), excluded=(1,)), row()]
    assert draw_rows(logits, rows).tolist() == [2, INVALID, 0]
    rows[0].excluded = (0, 1, 2)
    assert draw_rows(logits, rows).tolist() == [NO_CANDIDATE, INVALID, 0]
    refuse_invalid([0, 2])
    with pytest.raises(RecipeError, match="no token can be drawn: the grammar and the minimum length exclude all"):
        refuse_invalid([0, NO_CANDIDATE])


@pytest.mark.parametrize(
    "narrow",
    [
        Row(SamplingSettings(logit_bias=((4, 1),))),
        Row(SamplingSettings(presence_penalty=1), [4]),
        Row(SamplingSettings(), excluded=[-1]),
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(narrow: Row) -> None:
    if narrow.history:
        narrow.append(4)
    with pytest.raises(IndexError, match=r"the vocabulary has 4"):
        draw_rows(LOGITS, [narrow])


def test_as_many_rows_as_logits() -> None:
    assert draw_rows(torch.zeros(0, 5), []).tolist() == []
    with pytest.raises(ValueError, match="2 rows to draw from logits of 1"):
        draw_rows(LOGITS, [row(), row()])


@given(st.integers(0, 99), st.sampled_from([{}, {"temperature": 0.5, "top_k": 7, "min_p": 0.01}, {"top_p": 0.8}]))
def test_a_row_is_drawn_as_it_is_alone(seed: int, settings: dict[str, Any]) -> None:
    logits = torch.randn(8, 33, generator=generator(seed)) * 3
    rows = [Row(SamplingSettings(**settings), uniform=uniform(seed, index, 0)) for index in range(8)]
    together = draw_rows(logits, rows)
    assert [draw_rows(logits[at : at + 1], rows[at : at + 1]).item() for at in range(8)] == together.tolist()


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, -INF], [0.0] * 5])
    one, other = log_probabilities(logits, [Query(0, 2, 9), Query(1, 4, 2)])
    expected = logits.double().log_softmax(-1)
    assert one.token == pytest.approx(expected[0, 2].item())
    assert [token for token, _ in one.likeliest] == [1, 3, 2, 0], "of equal ones the lower id first, and none of zero"
    assert [value for _, value in one.likeliest] == pytest.approx(expected[0, [1, 3, 2, 0]].tolist())
    assert [token for token, _ in other.likeliest] == [0, 1]
    assert [value for _, value in other.likeliest] == pytest.approx([-math.log(5)] * 2)
    (alone,) = log_probabilities(logits, [Query(0, 4)])
    assert alone == (-INF, ())
    (unknown,) = log_probabilities(torch.tensor([[NAN, 1.0]]), [Query(0, 1, 1)])
    assert math.isnan(unknown.token)
    assert unknown.likeliest == ()
    for query in (Query(2, 0), Query(-1, 0), Query(0, 5), Query(0, -1)):
        with pytest.raises(IndexError):
            log_probabilities(logits, [query])
