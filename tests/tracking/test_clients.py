"""The real clients of tracking services, offline: wandb offline, MLflow on SQLite, trackio local."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gemmule.run_folder import RunFolder, read_json_lines
from gemmule.tracking.process import FINISH_SECONDS, ServiceProcess, send
from gemmule.tracking.tags import TAGS

# Each loads a client of its own, for seconds, in processes of its own.
pytestmark = pytest.mark.slow


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed: pip install 'gemmule[{library}]'")


def copy_of(run: Path, folder: Path, lines: int | None = None) -> RunFolder:
    """Copy what a run has to send, or its first so many lines of metrics."""
    folder.mkdir()
    for name in ("recipe.toml", "samples.jsonl", "loss.png"):
        (folder / name).write_bytes((run / name).read_bytes())
    append_metrics(run, RunFolder(folder), 0, lines)
    return RunFolder(folder)


def append_metrics(run: Path, copy: RunFolder, start: int, end: int | None = None) -> None:
    with copy.metrics.open("ab") as file:
        file.writelines((run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[start:end])


def expected(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Return what a service should have: (step, value) by tag."""
    lines = run.read_metrics()
    wanted = {tag: [(line["step"], line[key]) for line in lines if key in line] for key, tag in TAGS.items()}
    return {tag: values for tag, values in wanted.items() if values}


def printed(program: str, given: str = "") -> Any:
    """Run a program in a process of its own, and read the JSON that it prints last."""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


READ_MLFLOW = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("gemmule").experiment_id])
history = {tag: client.get_metric_history(run.info.run_id, tag) for tag in run.data.metrics}
metrics = {tag: [(one.step, one.value) for one in values] for tag, values in history.items()}
def files(path=None):
    for item in client.list_artifacts(run.info.run_id, path):
        yield from files(item.path) if item.is_dir else [item.path]
print(json.dumps([metrics, run.data.params, sorted(files()), run.info.status]))
"""

READ_TRACKIO = """
import json
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("gemmule")
print(json.dumps(SQLiteStorage.get_logs("gemmule", run["name"] if isinstance(run, dict) else run)))
"""


@needs("mlflow")
def test_mlflow_on_sqlite_has_the_whole_run_once(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow keeps artifacts
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = copy_of(tiny_run, tmp_path / "run", lines=7)
    assert send(run, "mlflow") == "MLflow: sent 7 logged steps, up to step 7"
    append_metrics(tiny_run, run, 7)
    run.sent("mlflow").write_text(json.dumps(json.loads(run.sent("mlflow").read_text()) | {"step": 0}))  # was killed
    assert send(run, "mlflow") == "MLflow: sent 5 logged steps, up to step 12", "the service knows what it has"
    metrics, params, files, status = printed(READ_MLFLOW)
    assert {tag: [tuple(pair) for pair in pairs] for tag, pairs in metrics.items()} == expected(run)
    assert (params["train.steps"], status) == ("12", "FINISHED")
    samples = [f"sample/{index}/step-{step:08d}.txt" for index in (0, 1) for step in (6, 12)]
    assert files == ["loss.png", *samples]


@needs("trackio")
def test_trackio_has_the_whole_run_once(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = copy_of(tiny_run, tmp_path / "run", lines=7)
    assert send(run, "trackio") == "trackio: sent 7 logged steps, up to step 7"
    append_metrics(tiny_run, run, 7)
    assert send(run, "trackio") == "trackio: sent 5 logged steps, up to step 12"
    logged = printed(READ_TRACKIO)
    shown = {
        tag: [(line["step"], line[tag]) for line in logged if tag in line and "loss" not in line]
        for tag in expected(run)
    }
    assert shown == expected(run)
    (text,) = [line["sample/0"]["_value"] for line in logged if line["step"] == 12 and "sample/0" in line]
    (sample, _) = [line["text"] for line in run.read_samples() if line["step"] == 12]
    assert text == "    " + sample.replace("\n", "\n    "), "shown as it is, not as Markdown"
    assert any("loss" in line for line in logged), "the picture"


@needs("wandb")
def test_wandb_offline_has_the_whole_run_and_resumes_under_the_same_name(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = copy_of(tiny_run, tmp_path / "run", lines=7)
    assert send(run, "wandb") == "Weights & Biases: sent 7 logged steps, up to step 7"
    append_metrics(tiny_run, run, 7)
    assert send(run, "wandb") == "Weights & Biases: sent 5 logged steps, up to step 12"
    folders = sorted((run.tracking / "wandb").glob("offline-run-*"))
    identity = json.loads(run.sent("wandb").read_text())["identity"]
    assert [folder.name.rpartition("-")[2] for folder in folders] == [identity, identity]
    history = [line for folder in folders for line in wandb_history(folder)]
    shown = {tag: [(line["_step"], line[tag]) for line in history if tag in line] for tag in expected(run)}
    assert shown == expected(run)
    assert [line["_step"] for line in history if any(key.startswith("sample/0") for key in line)] == [6, 12]


READ_WANDB = """
import json, sys
from wandb.proto.wandb_internal_pb2 import Record
lines = []
for data in map(bytes.fromhex, json.load(sys.stdin)):
    record = Record.FromString(data)
    if record.WhichOneof("record_type") == "history":
        items = record.history.item
        lines.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
print(json.dumps(lines))
"""


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Read the history of an offline run: a log in LevelDB's format, of the library's own messages."""
    (file,) = folder.glob("*.wandb")
    data, position, records, parts = file.read_bytes(), 7, list[str](), b""
    while position < len(data):
        if 32_768 - position % 32_768 < 7:  # the end of a block
            position += 32_768 - position % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts.hex())
            parts = b""
    lines: list[dict[str, Any]] = printed(READ_WANDB, given=json.dumps(records))
    return lines


@pytest.fixture(params=["refused", "silent"])
def bad_address(request: pytest.FixtureRequest) -> Any:
    """Yield the URL of a server that refuses connections, or takes them and never answers."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "name", [pytest.param("wandb", marks=needs("wandb")), pytest.param("mlflow", marks=needs("mlflow"))]
)
def test_a_server_that_refuses_or_never_answers_holds_up_nobody(
    name: str,
    bad_address: str,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bad_address)
    monkeypatch.setenv("WANDB_BASE_URL", bad_address)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = copy_of(tiny_run, tmp_path / "run")
    service = ServiceProcess(name)
    service.start(run, 0)
    for line in read_json_lines(run.metrics):
        service.log_metrics(line)
        time.sleep(0.5)  # the client is loaded, and asks
    start = time.monotonic()
    service.stop()
    service.finish()
    assert time.monotonic() - start < FINISH_SECONDS + 1.5
    assert len(caplog.records) == 1
    assert service._process is None
    assert not alive(run), "a process of the client is left"


def alive(run: RunFolder) -> bool:
    """Whether a process is left that was started for the run, once it had time to see that its parent is gone."""
    end = time.monotonic() + 20
    while any(str(run.path) in words for words in command_lines()):
        if time.monotonic() > end:
            return True
        time.sleep(0.2)
    return False


def command_lines() -> list[str]:
    files = Path("/proc").glob("[0-9]*/cmdline")
    words = []
    for file in files:
        if file.parent.name != str(os.getpid()):
            try:
                words.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
    return words
