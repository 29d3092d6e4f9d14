"""--follow: newer checkpoints of a run, between requests."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import serving, settings_for

from gemmule.errors import UserError
from gemmule.run_folder import RunFolder, run_of
from gemmule.serve.follow import check_followed
from gemmule.train.checkpoint import checkpoints
from runs import wait_until


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
        end = time.monotonic() + 120
        while len(set(fingerprints)) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        stop.set()
        thread.join(120)
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


def test_runs_alone_are_followed_and_other_models_stand_beside_them(
    young_run: Path, tmp_path: Path, model_folder: Path
) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        check_followed(settings_for(model_folder, follow=True))
    oldest = checkpoints(young_run)[-1]
    settings = settings_for(young_run, oldest, model_folder, follow=True)
    check_followed(settings)
    newest = max(tmp_path.glob("step-*"))
    with serving(young_run, oldest, model_folder, follow=True, follow_seconds=0.1, max_rows=4) as server:

        def models() -> list[Any]:
            found: list[Any] = server.ask("/v1/models").json["data"]
            return found

        first, second, third = models()
        assert [each["followed"] for each in (first, second, third)] == [True, False, False]
        assert first["fingerprint"] == second["fingerprint"]
        assert first["step"] == second["step"] == int(oldest.name.removeprefix("step-"))
        newest.rename(RunFolder(young_run).checkpoints / newest.name)
        wait_until(lambda: models()[0]["checkpoint"] == newest.name)
        assert models()[1:] == [second, third]


def test_the_length_of_training_is_reported_of_all_that_belongs_to_a_run(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, copy, namesake = checkpoints(tiny_run)[0], tmp_path / "copy", tmp_path / "other" / tiny_run.name
    shutil.copytree(RunFolder(tiny_run).model, copy)
    shutil.copytree(tiny_run, namesake)
    monkeypatch.chdir(RunFolder(tiny_run).model)
    with serving(tiny_run, checkpoint, ".", copy, max_rows=2) as server:
        models = server.ask("/v1/models").json["data"]
    known = [(each["trained_context"], each["run"], each["step"]) for each in models]
    step = int(checkpoint.name.removeprefix("step-"))
    run = (32, tiny_run.name)
    assert known == [(*run, step), (*run, step), (*run, None), (None, None, None)]
    assert not any(each["followed"] for each in models)
    with serving(tiny_run, checkpoint, RunFolder(namesake).model, max_rows=2) as server:
        runs = [each["run"] for each in server.ask("/v1/models").json["data"]]
    assert runs == [f"{tiny_run.parent.name}/{tiny_run.name}"] * 2 + [f"other/{tiny_run.name}"]


@pytest.mark.parametrize("recipe", ["", "train = 3", "[train]\ncontext = true", "[train", "\x00"])
def test_a_recipe_that_cannot_be_read_leaves_it_unknown(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.toml").write_text(recipe)
    found = run_of(tmp_path)
    assert found is not None
    assert found.trained_context() is None
