"""environment.jsonl: one line per start, and nothing that could stop a run."""

import subprocess
from pathlib import Path

import pytest
import torch

from gemmule.growing_file import GrowingFile
from gemmule.run_folder import RunFolder, read_json_lines
from gemmule.runtime import Runtime
from gemmule.train import environment
from gemmule.train.environment import commit, log_environment, processor

RUNTIME = Runtime(torch.device("cpu"))


def test_each_start_adds_a_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log_environment(run, 0, RUNTIME)
    with run.environment.open("ab") as file:
        file.write(b'{"step": 3, "cut')  # by a kill
    log_environment(run, 7, RUNTIME)
    starts = list(GrowingFile(run.environment).read())
    assert [start["step"] for start in starts] == [0, 7]
    assert starts[0]["torch"] == torch.__version__
    assert (starts[0]["device"], starts[0]["processes"]) == ("cpu", 1)
    assert starts[0]["cores"] >= 1
    assert starts[0]["memory"] > 1e8


def test_a_resumed_run_has_a_line_for_each_start(tiny_run: Path) -> None:
    assert [start["step"] for start in read_json_lines(tiny_run / "environment.jsonl")] == [0]


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, messages: list[str]) -> None:
    run = RunFolder(tmp_path)
    run.environment.mkdir()
    log_environment(run, 0, RUNTIME)
    assert messages == [f"{run.environment}: cannot be written: Is a directory; the run continues"]


def test_the_commit_is_that_of_the_checkout_the_package_runs_from() -> None:
    root = environment.PACKAGE.parents[1]
    done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode or not (root / "pyproject.toml").exists():
        pytest.skip("not run from a git checkout")
    assert (commit() or "").removesuffix("-dirty") == done.stdout.strip()


def test_an_installed_package_takes_no_commit_of_the_folder_it_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a virtual environment inside somebody's own repository."""
    installed = tmp_path / ".venv" / "gemmule"
    installed.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(environment, "PACKAGE", installed.resolve())
    assert commit() is None


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() is None
    assert processor()
