"""--follow: newer checkpoints of a run, between requests."""

import shutil
import threading
import time
from pathlib import Path

import pytest
from serving import serving, settings_for

from gemmule.errors import UserError
from gemmule.run_folder import RunFolder
from gemmule.serve.follow import check_followed
from gemmule.train.checkpoint import checkpoints


@pytest.fixture
def young_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a run that has its oldest checkpoint alone; the others lie beside it."""
    copy = tmp_path / "young"
    shutil.copytree(tiny_run, copy)
    for checkpoint in checkpoints(copy)[:-1]:
        checkpoint.rename(tmp_path / checkpoint.name)
    return copy


def test_a_newer_checkpoint_is_taken_up_and_requests_keep_theirs(young_run: Path, tmp_path: Path) -> None:
    newer = sorted(tmp_path.glob("step-*"))
    assert newer
    body = {"prompt": "Mia", "max_tokens": 20, "min_tokens": 20, "seed": 1}
    with serving(young_run, follow=True, follow_seconds=0.1, max_rows=4) as server:
        (before,) = server.ask("/v1/models").json["data"]
        first = server.complete(**body).json
        assert first["system_fingerprint"] == before["fingerprint"]
        stop = threading.Event()
        fingerprints: list[str] = []

        def ask() -> None:
            while not stop.is_set():
                answer = server.complete(**body)
                assert answer.status == 200
                if answer.json["system_fingerprint"] == before["fingerprint"]:
                    assert answer.json["choices"] == first["choices"]
                fingerprints.append(answer.json["system_fingerprint"])

        thread = threading.Thread(target=ask)
        thread.start()
        newest = newer[-1]
        newest.rename(RunFolder(young_run).checkpoints / newest.name)
        end = time.monotonic() + 20
        while len(set(fingerprints)) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        stop.set()
        thread.join(20)
        (after,) = server.ask("/v1/models").json["data"]
        assert after["checkpoint"] == newest.name
        assert after["fingerprint"] == fingerprints[-1]


def test_a_damaged_checkpoint_is_passed_over(young_run: Path) -> None:
    damaged = RunFolder(young_run).checkpoint(999)
    damaged.mkdir()
    with serving(young_run, follow=True, follow_seconds=0.05, max_rows=4) as server:
        before = server.ask("/v1/models").json
        time.sleep(0.5)
        assert server.ask("/v1/models").json == before
        assert server.complete(prompt="Mia").status == 200


def test_only_runs_are_followed(model_folder: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        check_followed(settings_for(model_folder, follow=True))
