"""Tracking services: what arrives there, exactly once; and that a bad one costs a warning and two seconds."""

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemmule.errors import MissingExtra, RecipeError, TrackingError
from gemmule.run_folder import RunFolder
from gemmule.tracking import Tracking, TrackingSettings, with_trackers
from gemmule.tracking import process as process_module
from gemmule.tracking.process import FINISH_SECONDS, send
from gemmule.tracking.reader import RunReader, settings_of
from gemmule.tracking.services import require_library
from runs import gemmule, wait_until

# What the machine needs beside the two seconds, when other tests are busy.
SLACK = 1.5

Fake = Callable[[str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a service of a kind in the place of trackio; return the file that gets what arrives."""
    library, arrived = tmp_path / "library", tmp_path / "arrived.jsonl"
    library.mkdir()
    shutil.copy(Path(__file__).with_name("fake_service.py"), library / "trackio.py")

    def put(kind: str) -> Path:
        monkeypatch.setenv("FAKE", kind)
        monkeypatch.setenv("FAKE_ARRIVED", str(arrived))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(library), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.syspath_prepend(str(library))
        return arrived

    return put


def a_run(folder: Path, steps: int = 0) -> RunFolder:
    folder.mkdir()
    run = RunFolder(folder)
    run.recipe.write_text('[train]\nsteps = 4\nsample_prompts = ["Once"]\n')
    for step in range(1, steps + 1):
        write_step(run, step)
    return run


def write_step(run: RunFolder, step: int, **more: Any) -> dict[str, Any]:
    line = {"step": step, "loss": 1.0 / step, "lr": 0.1, "seconds": float(step)} | more
    append(run.metrics, line)
    return line


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def arrived_steps(arrived: Path) -> list[int]:
    return [json.loads(line)["step"] for line in arrived.read_text().splitlines()]


def tracking(run: RunFolder) -> Tracking:
    return Tracking(TrackingSettings(to=("trackio",)), run, 0)


def ended_in_time(one: Tracking) -> bool:
    start = time.monotonic()
    one.stop()
    one.finish()
    return time.monotonic() - start < FINISH_SECONDS + SLACK


def test_a_run_arrives_while_it_goes_on_and_each_step_once(fake: Fake, tmp_path: Path) -> None:
    arrived, run = fake("good"), a_run(tmp_path / "run")
    one = tracking(run)
    for step in range(1, 4):
        one.log_metrics(write_step(run, step))
    wait_until(lambda: arrived.exists() and arrived_steps(arrived) == [1, 2, 3])
    assert ended_in_time(one)
    first = json.loads(arrived.read_text().splitlines()[0])
    assert first == {"name": first["name"], "step": 1, "loss/train": 1.0, "optimizer/learning_rate": 0.1}


def test_a_resumed_run_goes_on_in_the_same_remote_run_without_repeating_steps(fake: Fake, tmp_path: Path) -> None:
    arrived, run = fake("good"), a_run(tmp_path / "run", steps=5)
    send(run, "trackio")
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:3]))  # killed, resumed at step 3
    one = tracking(run)
    for step in range(4, 8):
        one.log_metrics(write_step(run, step))
    wait_until(lambda: arrived_steps(arrived)[-1] == 7)
    assert ended_in_time(one)
    assert arrived_steps(arrived) == [1, 2, 3, 4, 5, 6, 7]
    assert len({json.loads(line)["name"] for line in arrived.read_text().splitlines()}) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("refusing", "cannot be written: Connection refused"),
        ("silent", "had not taken everything 2 s after the end"),
        ("slow", "had not taken everything 2 s after the end"),
        ("crashing", "its process was ended by signal 6"),
    ],
)
def test_a_bad_service_costs_one_warning_and_two_seconds(
    fake: Fake, tmp_path: Path, kind: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake(kind)
    run = a_run(tmp_path / "run")
    one = tracking(run)
    slowest = 0.0
    for step in range(1, 30):
        line = write_step(run, step)
        start = time.perf_counter()
        one.log_metrics(line)
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(0.02)
    assert slowest < 0.5, "training waited for the service"
    assert ended_in_time(one)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning == (
        f"tracking.to = trackio: {reason}; the run continues, and metrics.jsonl has all; send the rest with:  "
        f"gemmule report --send trackio {run.path}"
    )


def test_three_silent_services_cost_two_seconds_together(fake: Fake, tmp_path: Path) -> None:
    fake("silent")
    processes = [process_module.ServiceProcess("trackio") for _ in range(3)]
    for number, process in enumerate(processes):
        process.start(a_run(tmp_path / f"run{number}", steps=2), 0)
    start = time.monotonic()
    for process in processes:
        process.stop()
    for process in processes:
        process.finish()
    assert time.monotonic() - start < FINISH_SECONDS + SLACK


def test_a_killed_process_is_warned_of_and_started_again_and_no_step_is_missing(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_module, "_RETRY_SECONDS", 0.1)
    arrived, run = fake("good"), a_run(tmp_path / "run")
    service = process_module.ServiceProcess("trackio")
    service.start(run, 0)
    service.log_metrics(write_step(run, 1))
    wait_until(lambda: arrived.exists() and arrived_steps(arrived) == [1])
    assert service._process is not None
    os.kill(service._process._child.pid, signal.SIGKILL)
    service._process.wait(5)
    for step in range(2, 5):
        service.log_metrics(write_step(run, step))
        time.sleep(0.15)
    wait_until(lambda: arrived_steps(arrived) == [1, 2, 3, 4])
    service.stop()
    service.finish()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "trackio: its process was ended by signal 9; the run continues" in warning


def test_what_could_not_be_sent_is_sent_later_and_once(fake: Fake, tmp_path: Path) -> None:
    fake("refusing")
    run = a_run(tmp_path / "run", steps=250)
    with pytest.raises(TrackingError, match="trackio: cannot be written: Connection refused"):
        send(run, "trackio")
    arrived = fake("good")
    assert send(run, "trackio") == "trackio: sent 250 logged steps, up to step 250"
    assert send(run, "trackio") == "trackio: sent 0 logged steps, up to step 250"
    assert arrived_steps(arrived) == list(range(1, 251))
    assert "finished" in run.service_log("trackio").read_text()


def test_sending_is_a_command_that_answers_in_a_sentence(fake: Fake, tmp_path: Path) -> None:
    fake("good")
    run = a_run(tmp_path / "run", steps=2)
    assert gemmule("report", "--send", "trackio", run.path).out == "trackio: sent 2 logged steps, up to step 2\n"
    nowhere = gemmule("report", "--send", "comet", run.path)
    assert (nowhere.code, "no such service; there are wandb, mlflow, trackio" in nowhere.err) == (2, True)
    empty = gemmule("report", "--send", "trackio", tmp_path)
    assert (empty.code, "is no run folder with metrics to send" in empty.err) == (2, True)


def test_two_processes_never_send_one_run_at_once(fake: Fake, tmp_path: Path) -> None:
    fake("silent")
    run = a_run(tmp_path / "run", steps=2)
    one = tracking(run)
    wait_until(lambda: run.sent("trackio").exists())
    with pytest.raises(TrackingError, match="another process is writing there"):
        send(run, "trackio")
    assert ended_in_time(one)


def test_a_damaged_position_is_told(fake: Fake, tmp_path: Path) -> None:
    fake("good")
    run = a_run(tmp_path / "run", steps=2)
    run.tracking.mkdir()
    run.sent("trackio").write_text('{"identity": "abc", "st')
    with pytest.raises(TrackingError, match=r"trackio\.json: is damaged; without it, another remote run begins"):
        send(run, "trackio")


def test_track_adds_to_the_recipe_and_refuses_what_does_not_exist(
    fake: Fake, tiny_recipe: Path, tmp_path: Path
) -> None:
    fake("good")
    settings = TrackingSettings()
    assert with_trackers(settings, ["trackio", "tensorboard"]).to == ("tensorboard", "trackio")
    assert with_trackers(settings, []) is settings
    with pytest.raises(RecipeError, match="--track comet: no such tracker; there are tensorboard, wandb"):
        with_trackers(settings, ["comet"])
    ended = gemmule("train", tiny_recipe, "--out", tmp_path / "run", "--track", "comet")
    assert (ended.code, (tmp_path / "run").exists()) == (2, False)


def test_a_folder_named_as_a_library_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "mlflow", raising=False)
    with pytest.raises(MissingExtra, match=r"tracking a run in MLflow needs .* pip install 'gemmule\[mlflow\]'"):
        require_library("mlflow")


def test_a_validated_step_waits_for_its_samples(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", steps=1)
    reader = RunReader(run, after=0)
    write_step(run, 2, val_loss=2.0)
    assert [record.step for record in reader.read()] == [1]
    for text in ("Once there was", "Then there was"):
        append(run.samples, {"step": 2, "prompt": "", "text": text})
    assert reader.read() == []
    write_step(run, 3, val_loss=1.5)
    (record,) = reader.read()
    assert (record.step, record.texts) == (2, {"sample/0": "Once there was", "sample/1": "Then there was"})
    assert record.metrics["loss/validation"] == 2.0
    assert [record.step for record in reader.read(ended=True)] == [3]


def test_lines_that_are_cut_or_damaged_are_left_out(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", steps=1)
    reader = RunReader(run, after=0)
    with run.metrics.open("a") as file:
        file.write('\0\0\n[1]\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
        file.flush()
        assert [record.step for record in reader.read()] == [1, 2]
        file.write('ss": 1.0}\n')
    assert [record.step for record in reader.read()] == [3]


def test_the_recipe_becomes_settings_with_dotted_names(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert settings_of(run) == {"train.steps": 4, "train.sample_prompts": '["Once"]'}
