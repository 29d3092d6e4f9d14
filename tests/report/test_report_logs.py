"""Logs that grow, are cut, replaced or damaged."""

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gemmule import growing_file
from gemmule.growing_file import GrowingFile
from gemmule.report.logs import LONGEST_SAMPLE, RunLogs, Samples
from run_folders import metrics_lines, write_lines


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


@pytest.fixture
def run(tmp_path: Path) -> RunLogs:
    return RunLogs(tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl")


def losses(run: RunLogs) -> list[float]:
    return [point.value for point in run.metrics.curves["loss"].extremes()]


def test_only_what_was_appended_is_read_and_a_cut_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = GrowingFile(path)
    assert list(file.read()) == []
    append(path, '{"a": 1}\n{"a": ')
    assert list(file.read()) == [{"a": 1}]
    assert list(file.read()) == []
    append(path, "2}\n")
    assert list(file.read()) == [{"a": 2}]
    assert file.damaged == 0


def test_damaged_lines_are_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\n\0\0\0\n[1, 2]\nno json\n\xff\xfe\n{"a": NaN}\n' + b"[" * 5000 + b"\n")
    file = GrowingFile(path)
    one, other = file.read()
    assert one == {"a": 1}
    assert math.isnan(other["a"])
    assert file.damaged == 4


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_file, "_CHUNK", 1000)
    monkeypatch.setattr(growing_file, "_LONGEST_LINE", 5000)
    path = tmp_path / "log"
    path.write_text("x" * 20_000 + '\n{"a": 1}\n')
    file = GrowingFile(path)
    assert list(file.read()) == [{"a": 1}]
    assert file.damaged > 0
    assert len(file._rest) <= 5000


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(run: RunLogs, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": step, "loss": float(step)} for step in range(1, 11)])
    run.update()
    kept = "".join(path.read_text().splitlines(keepends=True)[:5])
    with path.open("r+") as file:  # as JsonLines does: cut, then written beyond the old end before anybody looked
        file.truncate(len(kept))
    append(path, "".join(json.dumps({"step": step, "loss": -1.0}) + "\n" for step in range(6, 30)))
    run.update()
    assert losses(run) == [1, 2, 3, 4, 5, *[-1.0] * 24]
    assert run.metrics.lines == 29
    assert run.metrics.overlaps == 0


def test_a_log_that_tells_steps_twice_shows_the_newest(run: RunLogs, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": float(step), "val_loss": float(step)} for step in (1, 2, 3)]
    lines += [{"step": step, "loss": -float(step), "val_loss": 9.0} for step in (2, 3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    run.update()
    assert losses(run) == [1, -2, -3]
    assert run.metrics.overlaps == 1
    assert run.metrics.best is not None
    assert run.metrics.best["step"] == 1


@pytest.mark.parametrize("how", ["removed", "replaced", "emptied"])
def test_a_run_that_begins_again_is_shown_from_its_start(run: RunLogs, tmp_path: Path, how: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, metrics_lines(50))
    run.update()
    assert run.metrics.lines == 50
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        os.truncate(path, 0)
    else:
        write_lines(tmp_path / "new", [{"step": 1, "loss": 5.0}])
        (tmp_path / "new").replace(path)
    run.update()
    assert run.metrics.lines == (1 if how == "replaced" else 0)


def test_values_that_are_no_numbers_are_passed_over(run: RunLogs, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": "low", "flag": True, "list": [1]}, {"step": "two", "loss": 2.0}, {"loss": 3.0},
        {"step": math.nan, "loss": 4.0}, {"step": 5, "loss": math.nan, "grad_norm": math.inf},
        {"step": 6, "loss": 1e999}, {"step": 7, "loss": 10**400}, {"step": 8, "loss": 8.0},
    ]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", lines)
    run.update()
    assert losses(run) == [8.0]
    assert run.metrics.not_finite == 3
    assert set(run.metrics.curves) == {"loss", "grad_norm"}


def test_samples_keep_the_first_and_the_last_and_cut_what_is_long() -> None:
    samples = Samples()
    for step in range(0, 1000, 10):
        samples.add({"step": step, "prompt": "p", "text": "x" * (10_000_000 if step == 990 else 5)})
    kept = samples.prompts["p"]
    assert (kept[0].step, kept[-1].step) == (0, 990)
    assert len(kept) == 8
    assert samples.left_out == 92
    assert len(kept[-1].text) == LONGEST_SAMPLE
    assert kept[-1].characters == 10_000_000
    gaps = [later.step - earlier.step for earlier, later in pairwise(kept)]
    assert max(gaps) <= 500


def test_samples_of_more_prompts_than_a_page_shows_are_counted() -> None:
    samples = Samples()
    for number in range(20):
        samples.add({"step": 1, "prompt": str(number), "text": "t"})
    assert len(samples.prompts) == 8
    assert samples.left_out == 12
