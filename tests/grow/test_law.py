"""The scaling law of `gemmule grow`: what repetition is worth, and a fit that finds the law that made the runs."""

import itertools

import pytest

from gemmule.grow.law import LAW, Law, Run, fit, worth_of


def test_text_that_is_not_repeated_is_worth_itself() -> None:
    assert worth_of(500, 1000, 8) == 500
    assert worth_of(1000, 1000, 8) == 1000


def test_each_further_epoch_is_worth_less() -> None:
    worth = [worth_of(1000 * epochs, 1000, 8) for epochs in range(1, 200)]
    gains = [after - before for before, after in itertools.pairwise(worth)]
    assert gains == sorted(gains, reverse=True)
    assert 900 < gains[0] < 1000
    assert worth[-1] == pytest.approx(9000, rel=1e-6), "never more than 1 + r epochs of new text"


def runs_of(law: Law, noise: float = 0.0) -> list[Run]:
    """Runs of which the law is true, of two corpora with floors of their own."""
    found = []
    grid = itertools.product(("a", "b"), (3e5, 1e6, 4e6), (512, 2048, 8192), (1e6, 4e6, 2e7))
    for number, (corpus, parameters, vocab_size, seen) in enumerate(grid):
        loss = law.loss(parameters, vocab_size, seen, 2e6) + {"a": 0.3, "b": 0.5}[corpus]
        found.append(Run(corpus, parameters, vocab_size, seen, 2e6, loss + noise * (-1) ** number))
    return found


def test_the_fit_finds_the_law_that_made_the_runs() -> None:
    law = Law(alpha=0.3, beta=0.4, gamma=0.4, r=8.0, a=20.0, b=200.0, c=2.0)
    found = fit(runs_of(law))
    assert tuple(found.law) == pytest.approx(tuple(law), rel=1e-4)
    assert found.floors == pytest.approx({"a": 0.3, "b": 0.5}, abs=1e-6)
    assert found.error < 1e-9


def test_the_fit_says_how_far_it_is_off() -> None:
    assert 0.005 < fit(runs_of(LAW, noise=0.01)).error < 0.011


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="8 runs cannot determine a law of 9 constants"):
        fit(runs_of(LAW)[23:31])


def test_runs_that_get_worse_with_everything_fit_no_law() -> None:
    upside_down = [run._replace(bits_per_byte=-run.bits_per_byte) for run in runs_of(LAW)]
    with pytest.raises(ValueError, match="no law of this form"):
        fit(upside_down)
