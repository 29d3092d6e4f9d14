"""The page of results says what its run folders say."""

from pathlib import Path

import pytest

import results
from gemmule.report.summary import read_run


def test_what_is_kept_of_a_run_gives_the_same_results(tiny_run: Path, tmp_path: Path) -> None:
    kept = tmp_path / tiny_run.name
    results.add(tiny_run, kept)
    assert results.results_page([read_run(kept)]) == results.results_page([read_run(tiny_run)])


def test_long_logs_are_thinned_and_keep_validations_and_ends(tiny_run: Path, tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0} | ({"val_loss": 2.0} if step == 1001 else {}) for step in range(1, 3002)]
    thinned = [line["step"] for line in results._thinned(lines)]
    assert {1, 1001, 3001} <= set(thinned)
    assert 250 <= len(thinned) <= 350


@pytest.mark.skipif(not results.KEPT.is_dir(), reason="no results are kept")
def test_the_page_is_made_from_what_is_kept() -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.results_page(results.kept_runs()), (
        "python benchmarks/results.py"
    )


@pytest.mark.skipif(not results.KEPT.is_dir(), reason="no results are kept")
def test_a_run_at_hand_differs_nowhere_from_what_is_kept() -> None:
    """Where `make story` was run again, its own results may differ, but not those of the run that was added."""
    for facts in results.kept_runs():
        again = results.ROOT / "runs" / facts.name
        if not (again / "environment.jsonl").is_file():
            continue
        run = read_run(again)
        if run.environments == facts.environments:
            assert list(results._row(run)) == list(results._row(facts)), f"python benchmarks/results.py --add {again}"
