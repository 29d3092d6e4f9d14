"""Sampling in C against the reference in torch: the same tokens, alone and in any company."""

import math
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemmule.inference.native import library, sampler
from gemmule.inference.native.sampler import NativeSampler, make_sampler, unavailable_reason
from gemmule.inference.sampling import (
    INVALID,
    MIN_TEMPERATURE,
    NO_CANDIDATE,
    REFERENCE,
    RULES,
    Query,
    Row,
    SamplingSettings,
    draw_rows,
    log_probabilities,
    probabilities,
    uniform,
)

if reason := unavailable_reason():
    pytest.skip(reason, allow_module_level=True)

NATIVE = NativeSampler()
NAN, INF = math.nan, math.inf
LAST = 1 - 2**-53  # the largest uniform number
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7, "min_p": 0.1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.8, "top_p": 0.7, "min_p": 0.2},
    {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {3: 4, 5: -100}},
]
RANDOM_ROWS = 2000


def numbers(seed: int, *shape: int, scale: float = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def bitmask(allowed: Tensor) -> Tensor:
    """Pack (V,) truth values into words."""
    padded = torch.zeros((len(allowed) + 31) // 32 * 32, dtype=torch.int64)
    padded[: len(allowed)] = allowed
    return (padded.view(-1, 32) << torch.arange(32)).sum(-1).to(torch.int32)


def random_settings(source: random.Random, vocabulary: int) -> SamplingSettings:
    """Return settings of which each is at its default half of the time."""
    given: dict[str, Any] = {
        "temperature": source.choice([0, 0.3, 0.7, 1.5, 5, 1e-40, 1e6]),
        "top_k": source.choice([1, 2, 5, 40, vocabulary - 1, vocabulary, 10**6]),
        "top_p": source.choice([1e-9, 0.3, 0.9, 0.999, 1 - 1e-12]),
        "min_p": source.choice([1e-9, 0.05, 0.3, 0.99]),
        "repetition_penalty": source.choice([0.7, 1.1, 2, 1e-300]),
        "presence_penalty": source.choice([-2, -0.3, 0.7, 2]),
        "frequency_penalty": source.choice([-1, 0.1, 0.5]),
        "logit_bias": {source.randrange(vocabulary): source.choice([-100, -1.5, 0.1, 3]) for _ in range(4)},
    }
    return SamplingSettings(**{name: value for name, value in given.items() if source.random() < 0.4})


def test_every_rule_is_compared() -> None:
    source = random.Random(0)
    changed = set().union(*(random_settings(source, 20).model_fields_set for _ in range(50)))
    assert changed == set(RULES), "each is one more case in sample.c, sampler.py and random_settings"


def random_row(source: random.Random) -> tuple[Tensor, Row]:
    vocabulary = source.choice([1, 2, 15, 17, 63, 64, 65, 256, 700, 4096, 5003])
    logits = numbers(source.randrange(10**6), vocabulary, scale=source.choice([0, 0.1, 1, 3, 30]))
    if source.random() < 0.4:  # ties
        logits = (logits * 2).round() / 2
    if source.random() < 0.2:
        logits[torch.rand(vocabulary, generator=torch.Generator().manual_seed(source.randrange(99))) < 0.3] = -INF
    prompt, reply = ([source.randrange(vocabulary) for _ in range(9)] for _ in range(2))
    number = source.choice([source.random(), 1e-6 * source.random(), 1 - 1e-6 * source.random()])
    row = Row(random_settings(source, vocabulary), prompt, reply, uniform=number)
    if source.random() < 0.2:
        row.excluded = frozenset(source.randrange(vocabulary) for _ in range(3))
    if source.random() < 0.2:
        row.allowed = bitmask(torch.tensor([source.random() < 0.5 for _ in range(vocabulary)]))
    return logits, row


def is_at_a_boundary(logits: Tensor, row: Row, token: int) -> bool:
    """Whether the reference gives the token for a uniform number or a top_p that differs by at most 1e-12."""
    for change in (0, -1e-12, 1e-12):
        settings = row.settings
        if settings.top_p < 1:
            settings = settings.replace(top_p=min(1.0, max(1e-300, settings.top_p + change)))
        nudged = Row(settings, excluded=row.excluded, allowed=row.allowed)
        nudged.history = row.history
        chance = probabilities(logits.double(), nudged)
        reached = chance.cumsum(-1)
        below = reached[token] - chance[token]
        if chance[token] > 0 and below - 1e-12 <= row.uniform <= reached[token] + 1e-12:
            return True
    return False


def test_c_draws_the_tokens_of_the_reference() -> None:
    """Sums of another order differ in their last bits, so tokens may differ where a number lies within 1e-12."""
    source, at_boundaries, kinds = random.Random(0), 0, dict.fromkeys((INVALID, NO_CANDIDATE, 0), 0)
    for _ in range(RANDOM_ROWS):
        logits, row = random_row(source)
        (expected,), (drawn,) = (each(logits[None], [row]).tolist() for each in (draw_rows, NATIVE.draw_rows))
        kinds[min(expected, 0)] += 1
        if drawn != expected:
            assert min(drawn, expected) >= 0, row.settings
            assert is_at_a_boundary(logits, row, drawn), (row.settings, row.uniform, drawn, expected)
            at_boundaries += 1
    assert at_boundaries <= RANDOM_ROWS / 1000, "a random number is hardly ever that near"
    assert min(kinds.values()) > 10, "all kinds occurred"


@pytest.mark.parametrize("vocabulary", [4096, 262_144])
@pytest.mark.parametrize("settings", SETTINGS)
def test_c_draws_the_tokens_of_the_reference_from_a_vocabulary_of_full_size(
    settings: dict[str, Any], vocabulary: int
) -> None:
    for scale in (0.02, 3.0):
        logits = numbers(1, 3, vocabulary, scale=scale)
        rows = [
            Row(SamplingSettings(**settings), range(99), range(90, 120), uniform=uniform(5, at, 0)) for at in range(3)
        ]
        assert NATIVE.draw_rows(logits, rows).tolist() == draw_rows(logits, rows).tolist()


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_row_is_drawn_bit_for_bit_as_it_is_alone(settings: dict[str, Any], threads: Any) -> None:
    """At the two neighboring numbers between which its token changes, among 63 other rows, with any threads."""
    vocabulary, place = 5003, 41
    logits = numbers(3, 64, vocabulary)
    rows = [Row(SamplingSettings(**SETTINGS[at % len(SETTINGS)]), [at], uniform=uniform(0, at, 0)) for at in range(64)]
    row = rows[place] = Row(SamplingSettings(**settings), range(50), range(40, 60))

    def alone(number: float) -> int:
        row.uniform = number
        return int(NATIVE.draw_rows(logits[place : place + 1], [row]))

    first, low, high = alone(0.3), 0.3, LAST
    while alone(high) != first and math.nextafter(low, 1) < high:
        middle = (low + high) / 2
        low, high = (middle, high) if alone(middle) == first else (low, middle)
    for number in (low, high):
        row.uniform = number
        expected = [NATIVE.draw_rows(logits[at : at + 1], rows[at : at + 1]).item() for at in range(64)]
        for count in (1, 2, 5):
            threads(count)
            assert NATIVE.draw_rows(logits, rows).tolist() == expected


def test_the_bits_are_those_of_the_source_whatever_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with the vectors of another machine."""
    plain = [flag for flag in library.FLAGS if flag[:2] not in ("-O", "-m")]
    monkeypatch.setattr(library, "FLAGS", ("-O1", *plain))
    monkeypatch.setattr(sampler, "load_library", library.load_library.__wrapped__)
    logits, other = numbers(0, 40, 3001), NativeSampler()
    queries = [Query(at, at, 20) for at in range(40)]
    assert other.log_probabilities(logits, queries) == NATIVE.log_probabilities(logits, queries)
    rows = [Row(SamplingSettings(**SETTINGS[at % 8]), [at], uniform=uniform(2, at, 0)) for at in range(40)]
    assert other.draw_rows(logits, rows).equal(NATIVE.draw_rows(logits, rows))


def test_threads_have_memory_of_their_own(threads: Any) -> None:
    logits = numbers(4, 24, 100_000)
    rows = [Row(SamplingSettings(**SETTINGS[at % 8]), [at], [3, at], uniform=uniform(0, at, 0)) for at in range(24)]
    threads(1)
    queries = [Query(at, at, 20) for at in range(24)]
    expected = NATIVE.draw_rows(logits, rows).tolist(), NATIVE.log_probabilities(logits, queries)
    threads(4)
    for _ in range(20):
        assert (NATIVE.draw_rows(logits, rows).tolist(), NATIVE.log_probabilities(logits, queries)) == expected


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 2, "top_k": 9}, {"top_p": 0.8}, {"temperature": 0.7, "min_p": 0.1}]
)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    count, logits, chosen = 10_000, numbers(2, 20, scale=1), SamplingSettings(**settings)
    rows = [Row(chosen, uniform=uniform(1, 0, index)) for index in range(count)]
    drawn = NATIVE.draw_rows(logits.expand(count, -1), rows)
    expected = probabilities(logits.double(), rows[0]) * count
    possible = expected > 0
    seen = drawn.bincount(minlength=20)
    assert seen[~possible].sum() == 0
    surprise = ((seen - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert freedom - 3.5 * math.sqrt(2 * freedom) < surprise < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-30])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[10.0, 20.0, 30.0, -INF], [3e38, 2e38, -3e38, 0.0], [0.0, 1e-5, 0.0, -1e-5]])
    for number in (0.0, LAST):
        rows = [Row(SamplingSettings(temperature=temperature), uniform=number)] * 3
        assert NATIVE.draw_rows(logits, rows).tolist() == [2, 0, 1]
    assert MIN_TEMPERATURE > 1e-40


@pytest.mark.parametrize("temperature", [1e6, 1e300, 1.7e308])
def test_the_largest_temperatures_are_uniform(temperature: float) -> None:
    logits = torch.cat((numbers(0, 100), torch.full((28,), -INF)))
    rows = [Row(SamplingSettings(temperature=temperature), uniform=(at + 0.5) / 100) for at in range(100)]
    assert NATIVE.draw_rows(logits.expand(100, -1), rows).tolist() == list(range(100))


@pytest.mark.parametrize("temperature", [1, 2, 0.7])
@pytest.mark.parametrize("distance", [-0.5, -0.25, -2.0])
def test_min_p_agrees_on_a_token_that_lies_exactly_at_it(temperature: float, distance: float) -> None:
    exact, answers = math.exp(distance / temperature), set()
    for likeliest in (0.5, 1000.5, -3000.5):
        logits, share = torch.tensor([[likeliest, likeliest + distance, likeliest + 2 * distance]]), exact * (1 - 8e-16)
        for _ in range(20):
            rows = [Row(SamplingSettings(temperature=temperature, min_p=share), uniform=LAST)]
            answers.add(draw_rows(logits, rows).item())
            assert NATIVE.draw_rows(logits, rows).item() == draw_rows(logits, rows).item()
            share = math.nextafter(share, 1)
    assert answers == {0, 1}


@pytest.mark.parametrize("vocabulary", [1, 16, 17, 100, 262_144])
@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 1),
        ({"top_p": 0.5}, 0.5),
        ({"min_p": 0.9}, 1),
        ({"temperature": 0}, 0),
        ({"top_p": 0.25, "min_p": 0.5}, 0.25),
    ],
)
@pytest.mark.parametrize("value", [0.0, -3e38, 7.5])
def test_of_equal_logits_the_lowest_ids_are_kept(
    vocabulary: int, settings: dict[str, Any], share: float, value: float
) -> None:
    logits, kept = torch.full((2, vocabulary), value), max(1, math.ceil(vocabulary * share))
    rows = [Row(SamplingSettings(**settings), uniform=number) for number in (0.0, LAST)]
    assert NATIVE.draw_rows(logits, rows).tolist() == [0, kept - 1]
    for k in (1, 7, vocabulary // 2):
        if 0 < k <= kept:
            rows = [Row(SamplingSettings(top_k=k, **settings), uniform=number) for number in (0.0, LAST)]
            last = max(1, math.ceil(k * share)) - 1
            assert NATIVE.draw_rows(logits, rows).tolist() == [0, last]


def test_zeros_of_both_signs_are_equal() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]])
    for settings in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0.1}):
        assert NATIVE.draw_rows(logits, [Row(SamplingSettings(**settings), uniform=LAST)]).tolist() == [1]
    assert NATIVE.log_probabilities(logits, [Query(0, 0, 2)])[0].likeliest[0][0] == 1


@pytest.mark.parametrize("settings", SETTINGS)
def test_where_all_but_one_are_excluded_it_is_drawn(settings: dict[str, Any]) -> None:
    logits, chosen = numbers(0, 1, 130), SamplingSettings(**settings)
    for token in (0, 5, 64, 129):
        others = frozenset(range(130)) - {token}
        for number in (0.0, 0.5, LAST):
            rows = [Row(chosen, [5], [5], excluded=others, uniform=number)]
            assert NATIVE.draw_rows(logits, rows).tolist() == [token]
            rows = [Row(chosen, allowed=bitmask(torch.arange(130) == token), uniform=number)]
            assert NATIVE.draw_rows(logits, rows).tolist() == [token]


@pytest.mark.parametrize("settings", SETTINGS)
def test_where_all_are_excluded_none_is_drawn(settings: dict[str, Any]) -> None:
    rows = [
        Row(SamplingSettings(**settings), excluded=range(130)),
        Row(SamplingSettings(**settings), allowed=torch.zeros(5, dtype=torch.int32)),
        Row(SamplingSettings(**settings), excluded=range(129)),
    ]
    assert NATIVE.draw_rows(numbers(0, 3, 130), rows).tolist() == [NO_CANDIDATE, NO_CANDIDATE, 129]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_logits_that_are_not_finite_are_told(value: float, settings: dict[str, Any]) -> None:
    """Wherever they are; minus infinity only where it is everywhere."""
    for vocabulary in (6, 64, 1000):
        for place in (slice(0, 1), slice(vocabulary - 1, vocabulary), slice(None)):
            logits = numbers(0, 2, vocabulary)
            logits[1, place] = value
            everything = place == slice(None)
            rows = [Row(SamplingSettings(**settings), [5], excluded=[5], uniform=0.5)] * 2
            first, second = NATIVE.draw_rows(logits, rows).tolist()
            assert first >= 0
            assert (second == INVALID) == (value != -INF or everything)


@given(st.integers(0, 10**6), st.sampled_from(SETTINGS), st.sampled_from([0.0, LAST]))
def test_what_is_ruled_out_is_never_drawn(seed: int, settings: dict[str, Any], number: float) -> None:
    logits = numbers(seed, 70)
    logits[torch.rand(70, generator=torch.Generator().manual_seed(seed)) < 0.7] = -INF
    logits[seed % 70] = 0
    row = Row(SamplingSettings(**settings), uniform=number)
    assert probabilities(logits.double(), row)[NATIVE.draw_rows(logits[None], [row])] > 0


def test_log_probabilities_are_those_of_the_reference() -> None:
    for vocabulary in (1, 5, 64, 1000, 4097, 262_144):
        for scale, step in ((3, 0), (3, 1), (0, 0), (1000, 0)):
            logits = numbers(vocabulary, 3, vocabulary, scale=scale)
            logits = logits.round() if step else logits
            logits[0, vocabulary // 2] = -INF if vocabulary > 1 else 0
            queries = [Query(at % 3, (at * 7) % vocabulary, top_n) for at, top_n in enumerate((0, 1, 5, 20, 20, 3))]
            for expected, answer in zip(
                log_probabilities(logits, queries), NATIVE.log_probabilities(logits, queries), strict=True
            ):
                assert answer.token == pytest.approx(expected.token, rel=1e-13, abs=1e-12)
                assert [token for token, _ in answer.likeliest] == [token for token, _ in expected.likeliest]
                known = [value for _, value in expected.likeliest]
                assert [value for _, value in answer.likeliest] == pytest.approx(known, rel=1e-13, abs=1e-12)


def test_log_probabilities_of_what_is_not_there() -> None:
    logits = numbers(0, 3, 9)
    logits[1, 4] = NAN
    assert NATIVE.log_probabilities(logits, []) == []
    unknown, known = NATIVE.log_probabilities(logits, [Query(1, 2, 3), Query(2, 2, 3)])
    assert math.isnan(unknown.token)
    assert unknown.likeliest == ()
    assert len(known.likeliest) == 3
    for query in (Query(3, 0), Query(-1, 0), Query(0, 9), Query(0, -1)):
        with pytest.raises(IndexError, match=r"Query\(row=.*the logits are \(3, 9\)"):
            NATIVE.log_probabilities(logits, [Query(0, 0), query])


@pytest.mark.parametrize(
    "row",
    [
        Row(SamplingSettings(logit_bias=((9, 1.0),))),
        Row(SamplingSettings(logit_bias=((2**31 - 1, 1.0),))),
        Row(SamplingSettings(repetition_penalty=2), [9]),
        Row(SamplingSettings(repetition_penalty=2), [-1]),
        Row(SamplingSettings(), excluded=[9]),
        Row(SamplingSettings(), excluded=[-1]),
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(row: Row) -> None:
    with pytest.raises(IndexError, match="names a token beyond the vocabulary, 9"):
        NATIVE.draw_rows(numbers(0, 1, 9), [row])


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(2, 9).double(), torch.zeros(2, 9).bfloat16(), torch.zeros(9, 2).T, torch.zeros(2, 0), torch.zeros(2)],
)
def test_logits_of_another_form_are_refused(logits: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be float32 \(B,V\) in the CPU's memory"):
        NATIVE.draw_rows(logits, [Row(SamplingSettings())] * 2)


def test_rows_and_bitmasks_must_fit() -> None:
    with pytest.raises(ValueError, match="1 rows to draw from logits of 2"):
        NATIVE.draw_rows(torch.zeros(2, 9), [Row(SamplingSettings())])
    with pytest.raises(ValueError, match=r"must be int32 \(2,\), contiguous"):
        NATIVE.draw_rows(torch.zeros(1, 40), [Row(SamplingSettings(), allowed=torch.zeros(1, dtype=torch.int32))])
    assert NATIVE.draw_rows(torch.zeros(0, 9), []).tolist() == []


def test_rows_of_a_larger_tensor_are_read_in_place() -> None:
    logits = numbers(0, 6, 50)
    rows = [Row(SamplingSettings(), uniform=0.4) for _ in range(3)]
    assert NATIVE.draw_rows(logits[::2, 5:40], rows).equal(draw_rows(logits[::2, 5:40].contiguous(), rows))


def test_a_sampler_is_made_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_sampler(torch.device("meta")) is REFERENCE
    native = make_sampler(torch.device("cpu"))
    assert native.draw_rows(torch.zeros(1, 4), [Row(SamplingSettings(), uniform=0.6)]).tolist() == [2]
    assert len(native.log_probabilities(torch.zeros(1, 4), [Query(0, 1, 2)])[0].likeliest) == 2
    monkeypatch.setattr(sampler, "load_library", lambda *_: "no C compiler (cc) was found")
    assert unavailable_reason() == "no C compiler (cc) was found"
    assert make_sampler(torch.device("cpu")) is REFERENCE


def test_the_structures_of_c_and_python_are_the_same(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = tmp_path / "sizes.c"
    program.write_text(
        f'#include "{sampler.SOURCE}"\n#include <stdio.h>\n'
        'int main(void) { printf("%zu %zu %zu", sizeof(Settings), sizeof(Row), sizeof(Query)); }\n'
    )
    subprocess.run([compiler, str(program), "-o", str(tmp_path / "sizes"), "-lm"], check=True)
    sizes = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout.split()
    assert [each.size for each in (sampler.SETTINGS, sampler.ROW, sampler.QUERY)] == [int(size) for size in sizes]
