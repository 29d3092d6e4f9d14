import random
from collections.abc import Callable

import numpy as np
import pytest

from gemmule.data.minhash import BANDS, ROWS, band_keys, signature

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def shingles(text: str) -> set[str]:
    return {text[place : place + 16] for place in range(len(text) - 15)}


def jaccard(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def estimated(one: str, other: str) -> float:
    return float((signature(one) == signature(other)).mean())


@pytest.mark.parametrize("length", [60, 600, 6000])
@pytest.mark.parametrize("changes", [1, 2, 5])
def test_signatures_agree_as_much_as_texts_do(length: int, changes: int) -> None:
    draw = random.Random(length + changes)
    errors = []
    for _ in range(40):
        one = "".join(draw.choices(LETTERS, k=length))
        other = list(one)
        for _ in range(changes):
            other[draw.randrange(length)] = "-"
        errors.append(estimated(one, "".join(other)) - jaccard(one, "".join(other)))
    # The standard deviation of one estimate is at most 0.5 / sqrt(120) = 0.046, more where there are few shingles.
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < (0.12 if length == 60 else 0.06)


def test_space_and_case_do_not_count() -> None:
    assert estimated("The Fox ran over\n the hill", "the fox  ran over the hill") == 1


def test_different_texts_do_not_agree() -> None:
    draw = random.Random(0)
    made: Callable[[], str] = lambda: "".join(draw.choices(LETTERS, k=500))  # noqa: E731
    assert max(estimated(made(), made()) for _ in range(100)) < 0.05


def test_short_texts_are_alike_only_if_equal() -> None:
    assert estimated("fox", "FOX") == 1
    assert estimated("fox", "fix") < 0.1
    assert not signature("").any()


def test_bands_have_equal_keys_where_they_agree() -> None:
    band = np.random.default_rng(0).integers(0, 2, (1000, ROWS)).astype(np.uint16)
    keys = band_keys(band)
    assert len(set(keys.tolist())) == len(set(map(tuple, band.tolist())))
    assert signature("a text that is long enough").shape == (BANDS, ROWS)
