"""`gemmule report`: what it writes, what it leaves alone, what it refuses."""

import os
import re
from pathlib import Path

import pytest

from run_folders import EVALUATION, Page, write_evaluations, write_run
from runs import gemmule

PNG, SVG = b"\x89PNG", b"<?xml"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "story")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


def test_a_trained_run_has_its_facts_in_the_page(tiny_run: Path, tmp_path: Path) -> None:
    """What the run itself records: machine, versions, commit of this checkout."""
    out = tmp_path / "page.html"
    assert gemmule("report", tiny_run, "--out", out, "--no-card").code == 0
    answers = {question: cells[0] for question, cells in Page(out.read_text()).rows["answers"].items()}
    assert "4 layers (3 local with a window of 8 tokens, 1 global)" in answers["What"]
    assert "train.txt; 400 documents" in answers["From what"]
    assert re.search(r"After all 12 steps: .* bits per byte", answers["How well"])
    assert re.search(r"\d+ cores?, .* of memory, 1 process", answers["Machine"])
    assert re.search(r"gemmule \d.*torch \d.*python 3", answers["Commit"])
    assert "not given" in answers["License of the data"]


def test_a_report_comes_with_curves_and_a_model_card(run: Path) -> None:
    ended = gemmule("report", run)
    assert ended.code == 0, ended.err
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert (run / "loss.png").read_bytes().startswith(PNG)
    assert (run / "loss.svg").read_bytes().startswith(SVG)
    assert (run / "model" / "README.md").read_text().startswith("---\nmodel_name:")
    again = (run / "loss.svg").read_bytes()
    assert gemmule("report", run).code == 0, "an earlier report is replaced"
    assert (run / "loss.svg").read_bytes() == again


@pytest.mark.parametrize(("start", "base"), [("google/gemma-3-270m", '"google/gemma-3-270m"'), ("runs/other", None)])
def test_the_card_names_the_model_that_a_run_started_from(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, base: str | None
) -> None:
    (tmp_path / "runs").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)  # where runs/other is a path, and the other none
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("[train]\n", f'[train]\nstart = "{start}"\n', 1))
    assert gemmule("report", run).code == 0
    found = re.search("^base_model: (.*)$", (run / "model" / "README.md").read_text(), re.MULTILINE)
    assert (found and found[1]) == base


def test_the_card_has_results_with_intervals_as_the_hub_reads_them(run: Path) -> None:
    assert gemmule("report", run).code == 0
    hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    card = hub.ModelCard.load(run / "model" / "README.md")
    assert card.data.model_name == "story"
    results = {(each.dataset_name, each.metric_type): each for each in card.data.eval_results}
    assert ("storybook:500, model", "bits_per_byte") in results
    measured = results["storybook:500", "bits_per_byte"]
    values = [each.metric_value for each in card.data.eval_results if each.metric_type == "bits_per_byte"]
    assert 0.212 in values
    assert [0.2101, 0.2139] in [(each.metric_args or {}).get("interval_95") for each in card.data.eval_results]
    assert measured.task_type == "text-generation"
    assert "| License of the data | cc-by-4.0 |" in card.text
    assert card.data.to_dict().get("license") is None


@pytest.mark.parametrize("text", ["my own words\n", "---\nlicense: gemma\n---\n"])
def test_a_card_that_is_not_ours_stays(run: Path, text: str) -> None:
    card = run / "model" / "README.md"
    card.write_text(text)
    ended = gemmule("report", run)
    assert ended.code == 0
    assert "kept, since it is not ours" in ended.err
    assert card.read_text() == text


def test_a_card_of_ours_that_was_changed_stays_and_one_that_was_not_is_replaced(run: Path) -> None:
    card = run / "model" / "README.md"
    assert gemmule("report", run).code == 0
    first = card.read_text()
    write_evaluations(run, EVALUATION | {"bits_per_byte": 0.5})
    assert gemmule("report", run).code == 0
    assert card.read_text() != first
    changed = card.read_text().replace("# story", "# My story")
    card.write_text(changed)
    assert gemmule("report", run).code == 0
    assert card.read_text() == changed


def test_without_a_model_or_with_no_card_none_is_written(run: Path) -> None:
    assert gemmule("report", run, "--no-card").code == 0
    assert not (run / "model" / "README.md").exists()
    (run / "model" / "config.json").unlink()
    assert gemmule("report", run).code == 0
    assert not (run / "model" / "README.md").exists()


def test_several_runs_are_one_page_in_the_current_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = write_run(tmp_path / "other")
    assert gemmule("report", run, other).code == 0
    assert len(Page((tmp_path / "report.html").read_text()).rows["answers"]["What"]) == 2
    assert not (run / "report.html").exists()


def refused(*arguments: object) -> str:
    ended = gemmule("report", *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.count("\n") == 1, "one sentence"
    return ended.err


def test_a_target_that_is_no_report_is_refused(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "notes.html"
    target.write_text("mine")
    assert "is there already, and no report" in refused(run, "--out", target)
    assert target.read_text() == "mine"
    assert "is a folder" in refused(run, "--out", tmp_path)
    assert "File exists" in refused(run, "--out", target / "below.html")


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "holds no run" in refused(tmp_path)
    assert f"its run folder is {run}" in refused(run / "data")
    assert not (tmp_path / "report.html").exists()


def test_options_that_contradict_are_refused(run: Path, tmp_path: Path) -> None:
    assert "--watch writes no file" in refused(run, "--watch", "--out", tmp_path / "x.html")
    assert "are for --watch" in refused(run, "--port", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_that_cannot_be_written_costs_a_note(run: Path, tmp_path: Path) -> None:
    run.chmod(0o500)
    ended = gemmule("report", run, "--out", tmp_path / "page.html")
    run.chmod(0o700)
    assert ended.code == 0
    assert "note:" in ended.err
    assert (tmp_path / "page.html").exists()
