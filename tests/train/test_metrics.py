import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmule.errors import OutputError
from gemmule.run_folder import read_json_lines
from gemmule.train.metrics import ChosenRepliesWatch, JsonLines, OverfittingWatch
from gemmule.train.state import LossEMA


def write(path: Path, records: list[dict[str, object]], keep_bytes: int = 0) -> int:
    with JsonLines(path, keep_bytes) as lines:
        for record in records:
            lines.write(record)
        return lines.size


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"step": 1, "loss": 0.1 + 0.2}, {"text": "Zoë said:\n\u201chi\u201d \u2028 🦊"}]
    size = write(tmp_path / "m.jsonl", records)
    assert read_json_lines(tmp_path / "m.jsonl") == records
    assert (tmp_path / "m.jsonl").read_bytes().count(b"\n") == 2
    assert size == (tmp_path / "m.jsonl").stat().st_size


def test_lines_are_there_while_the_file_is_open(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "m.jsonl") as lines:
        lines.write({"step": 1})
        assert read_json_lines(tmp_path / "m.jsonl") == [{"step": 1}]


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "m.jsonl") == []


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    size = write(tmp_path / "m.jsonl", [{"step": 1}])
    write(tmp_path / "m.jsonl", [{"step": 2}, {"step": 3}], keep_bytes=size)
    assert write(tmp_path / "m.jsonl", [{"step": "two"}], keep_bytes=size) == size + len('{"step": "two"}\n')
    assert read_json_lines(tmp_path / "m.jsonl") == [{"step": 1}, {"step": "two"}]


def test_a_new_run_forgets_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", [{"step": 1}])
    write(tmp_path / "m.jsonl", [])
    assert read_json_lines(tmp_path / "m.jsonl") == []


def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, [{"step": 1}, {"step": 2}])
    for cut in range(1, len('{"step": 2}\n')):
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n'[:-cut])
        assert read_json_lines(path) == [{"step": 1}]


@given(lost=st.integers(0, 24))
def test_a_file_shorter_than_the_checkpoint_knew_stays_readable(
    tmp_path_factory: pytest.TempPathFactory, lost: int
) -> None:
    path = tmp_path_factory.mktemp("lost") / "m.jsonl"
    size = write(path, [{"step": 1}, {"step": 2}])
    os.truncate(path, size - lost)
    whole = read_json_lines(path)
    write(path, [{"step": 3}], keep_bytes=size)
    assert read_json_lines(path) == [*whole, {"step": 3}]


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, send = tmp_path / "m.jsonl", os.pwrite
    with JsonLines(path) as lines:
        lines.write({"step": 1})
        with monkeypatch.context() as full:
            # A part of the next line still fits.
            full.setattr(
                os, "pwrite", lambda *given: send(given[0], given[1][:5], given[2]) if given[2] < 14 else refuse()
            )
            lines.write({"step": 2})
            lines.write({"step": 3})
        assert read_json_lines(path) == [{"step": 1}]
        assert lines.size == 3 * len(b'{"step": 1}\n')
        lines.write({"step": 4})
        assert read_json_lines(path) == [{"step": step} for step in (1, 2, 3, 4)]


def test_lines_that_never_found_room_are_not_lost_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with (
        pytest.raises(OutputError, match=r"m\.jsonl: no space left on the device"),
        JsonLines(tmp_path / "m.jsonl") as lines,
    ):
        lines.write({"step": 1})


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"nowhere/m\.jsonl: cannot be written: {os.strerror(errno.ENOENT)}"):
        JsonLines(tmp_path / "nowhere" / "m.jsonl")


def test_a_level_forgets_what_is_long_ago() -> None:
    level = LossEMA()
    for _ in range(50):
        level = level.updated(5.0)
    assert (level.mean, level.variance) == (5.0, 0.0)
    for _ in range(400):
        level = level.updated(2.0)
    assert level.mean == pytest.approx(2.0, abs=0.01)


def test_a_spike_is_six_deviations_above_the_level_and_never_a_small_thing() -> None:
    draw, level = random.Random(0), LossEMA()
    for _ in range(200):
        loss = 3.0 + draw.gauss(0, 0.1)
        assert not level.detects_spike(loss)
        level = level.updated(loss)
    assert level.variance**0.5 == pytest.approx(0.1, rel=0.3)
    assert level.detects_spike(4.0)
    assert not level.detects_spike(3.2)
    assert not level.detects_spike(1.0), "falling is no harm"
    quiet = LossEMA(steps=100, mean=3.0, variance=0.0)
    assert not quiet.detects_spike(3.1)
    assert quiet.detects_spike(3.2)
    assert not LossEMA(steps=10, mean=3.0).detects_spike(9.0), "the first steps know no level"


def warnings(*lines: tuple[float, float | None]) -> list[tuple[int, str]]:
    """What the watch says of lines of training and validation losses, and at which of them."""
    watch, said = OverfittingWatch(), []
    for step, (loss, val_loss) in enumerate(lines, start=1):
        line = {"step": step, "loss": loss} | ({} if val_loss is None else {"val_loss": val_loss})
        if sentence := watch.note(line):
            said.append((step, sentence))
    return said


def test_overfitting_is_reported_at_the_third_worse_validation_once() -> None:
    falling = [(3.0, 3.1), (2.0, 2.5), (1.9, None), (1.5, 2.6), (1.0, 2.6), (0.9, None), (0.5, 2.8), (0.3, 3.0)]
    ((step, sentence),) = warnings(*falling)
    assert step == 7
    assert "the validation loss is 2.800 after 2.500 at step 2" in sentence
    assert "the training loss fell from 2.000 to 0.500" in sentence
    for remedy in ("model.dropout", "train.early_stopping", 'train.final_model = "best"', "more text"):
        assert remedy in sentence
    again = [(0.2, 2.4), (0.19, 2.5), (0.18, 2.5), (0.17, 2.5), (0.16, 2.5)]
    assert [step for step, _ in warnings(*falling, *again)] == [7, 12], "a new best validation begins it anew"


def test_what_is_no_overfitting_is_not_reported() -> None:
    assert warnings((3.0, 3.1), (3.5, 3.5), (4.0, 4.0), (5.0, 5.0), (6.0, 6.0)) == [], "training gets worse as well"
    assert warnings((3.0, 3.0), (2.9, 3.01), (2.8, 3.01), (2.7, 3.01), (2.6, 3.01)) == [], "as good as the best"
    worse_and_noise = [(2.0, 2.5), (1.5, 2.6), (1.0, 2.6), (0.5, 2.8), (2.1, 2.9), (2.2, 2.9)]
    assert [step for step, _ in warnings(*worse_and_noise)] == [4]


def test_chosen_replies_that_sink_are_warned_of_once() -> None:
    watch = ChosenRepliesWatch()
    lines = [{"step": step, "chosen_log_ratio": -0.3 * step} for step in range(40)]
    warnings = [(line["step"], sentence) for line in lines if (sentence := watch.note(line))]
    [(step, sentence)] = warnings
    assert step == 19, "twenty steps make a trend"
    assert "less likely than in the reference, by 2.9 nats each" in sentence
    assert "preferences.sft_weight" in sentence
    steady = ChosenRepliesWatch()
    assert not any(steady.note({"step": step, "chosen_log_ratio": 0.1}) for step in range(99))
    assert steady.note({"step": 1, "loss": 2.0}) is None
