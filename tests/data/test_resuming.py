"""A preparation that is killed and goes on makes the same bytes as one that was not, whoever worked on it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
from gemmule.data import sources
from gemmule.data.prepare import prepare_dataset
from gemmule.data.settings import DataSettings
from gemmule.errors import OutputError, SourceError
from gemmule.tokenizer import TokenizerSettings
from messages import logged
from runs import Death

VOCABULARY = TokenizerSettings(vocab_size=330)
UNIT = 12_000
WORDS = "the fox ran over hills and far away to find its little den warm dry under oak trees by a stream".split()  # noqa: SIM905

# Runs the command with small units.
PROGRAM = """
import sys

if __name__ == "__main__":
    from gemmule.cli.main import main
    from gemmule.data import sources

    _, unit, *arguments = sys.argv
    sources.UNIT = int(unit)
    sys.argv = ["gemmule", *arguments]
    main()
"""


def write(path: Path, documents: int, seed: int) -> str:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) + f" {seed}-{n}." for n in range(documents)]
    texts += texts[::9]
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpus")
    rows = [json.dumps({"text": f"row {n} {' '.join(WORDS[n % 7 :])}"}) for n in range(300)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return {"text": write(folder / "train.txt", 500, 1), "rows": str(folder / "rows.jsonl")}


def settings(corpus: dict[str, str]) -> DataSettings:
    return DataSettings(train=(corpus["text"], corpus["rows"]), near_duplicates=0.9)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(corpus: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The dataset, made in one go by one process."""
    out = tmp_path_factory.mktemp("expected") / "out"
    finish(corpus, out)
    assert len(list(out.glob("train-*.tokens"))) > 6
    return content(out)


def command_of(corpus: dict[str, str], out: Path, workers: int, engine: str = "local") -> list[str]:
    options = ["--set", "data.near_duplicates=0.9", "--vocab-size", "330", "--engine", engine]
    return ["prepare", corpus["text"], corpus["rows"], *options, "--workers", str(workers), "--out", str(out)]


def start(corpus: dict[str, str], out: Path, workers: int, engine: str = "local") -> "subprocess.Popen[str]":
    script = out.parent / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, str(script), str(UNIT), *command_of(corpus, out, workers, engine)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(corpus: dict[str, str], out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT", UNIT)
        prepare_dataset(settings(corpus), VOCABULARY, out)


def test_several_processes_make_the_same_bytes_as_one(
    corpus: dict[str, str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(corpus, tmp_path / "out", workers=2)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert content(tmp_path / "out") == expected
    assert not (tmp_path / ".out.partial").exists()


MOMENTS = {
    "before anything is finished": Death("gemmule.data.clean:commit", 1),
    "after some units are clean": Death("gemmule.data.clean:commit", 5),
    "before documents are chosen": Death("gemmule.data.prepare:label_documents", 1),
    "before the choice is finished": Death("gemmule.data.prepare:commit", 1),
    "before the tokenizer is finished": Death("gemmule.data.prepare:commit", 2),
    "in the middle of a shard": Death("gemmule.data.encode:_batches", 3),
    "after some shards": Death("gemmule.data.encode:commit", 4),
    "before the report": Death("gemmule.data.prepare:plot_report", 1),
    "before it is a dataset": Death("gemmule.data.prepare:atomic_write", 1),
    "before it takes its name": Death("gemmule.data.prepare:atomic_replace", 1),
    "while it takes its name": Death("gemmule.files:_is_filled_in_place", 2),
}


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    corpus: dict[str, str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """One preparation, killed at every moment in turn; each process takes up what the one before left."""
    out, log, finished_units = tmp_path / "out", tmp_path / "log.txt", []
    for moment, death in MOMENTS.items():
        command, constants = command_of(corpus, out, workers=1), {"gemmule.data.sources:UNIT": UNIT}
        process = runs.start(*command, log=log, death=death, constants=constants)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"{moment}: {log.read_text()}"
        assert not out.exists(), moment
        work = tmp_path / ".out.partial"
        finished_units.append(len(list(work.glob("clean/*.json"))) + len(list(work.glob("encode/t*-*.json"))))
    assert finished_units[:2] == [0, 4]
    assert finished_units == sorted(finished_units[:-2]) + finished_units[-2:], "what is finished stays finished"
    finish(corpus, out)
    assert content(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_all_processes_killed_at_random_it_goes_on_to_the_same_bytes(
    corpus: dict[str, str], expected: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    draw, out, work = random.Random(seed), tmp_path / "out", tmp_path / ".out.partial"
    for units in sorted(draw.sample(range(len(expected)), 3)):
        process = start(corpus, out, workers=2)
        while len(list(work.rglob("*.json"))) < units:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(corpus, out)
    assert content(out) == expected


def test_what_is_finished_is_not_done_again_and_what_is_damaged_is(
    corpus: dict[str, str], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT", UNIT)
    out = tmp_path / "out"

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage.startswith("tokenizing") and done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(settings(corpus), VOCABULARY, out, stop)
    work = tmp_path / ".out.partial"
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.text")}
    damaged = sorted(work.glob("clean/train-*.text"))[2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shard = sorted(work.glob("encode/dataset/train-*.tokens"))[0]
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(settings(corpus), VOCABULARY, out, stop)
    assert [file for file, time in before.items() if file.stat().st_mtime_ns != time] == [damaged]
    prepare_dataset(settings(corpus), VOCABULARY, out)
    assert content(out) == expected


def test_other_settings_do_anew_what_depends_on_them_and_say_so(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT", UNIT)
    out, said = tmp_path / "out", list[str]()

    def stop(stage: str, *_: object) -> None:
        if stage.startswith("tokenizing"):
            raise KeyboardInterrupt

    def prepare(chosen: DataSettings, vocabulary: TokenizerSettings = VOCABULARY) -> float:
        with pytest.raises(KeyboardInterrupt), logged() as messages:
            prepare_dataset(chosen, vocabulary, out, stop)
        said.extend(messages)
        return (tmp_path / ".out.partial" / "clean" / "train-00000.text").stat().st_mtime_ns

    first = prepare(settings(corpus))
    assert prepare(settings(corpus)) == first
    assert said == []
    assert prepare(settings(corpus), TokenizerSettings(vocab_size=340)) == first, "cleaning does not depend on it"
    assert len(said) == 1
    assert "stages cached for other settings or sources are redone" in said[0]
    assert prepare(settings(corpus).replace(weights=(3.0, 1.0), mask_documents=True)) == first
    assert prepare(settings(corpus).replace(quality=True)) > first
    assert len(said) == 3
    os.utime(corpus["text"])
    second = prepare(settings(corpus).replace(quality=True))
    assert second > first
    assert len(said) == 4


def test_a_unit_that_cannot_be_read_keeps_what_was_and_is_mended(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT", UNIT)
    bad = tmp_path / "rows.jsonl"
    bad.write_text(Path(corpus["rows"]).read_text() + "\n{broken", encoding="utf-8")
    chosen = settings(corpus).replace(train=(corpus["text"], str(bad)))
    with pytest.raises(SourceError, match=r"rows\.jsonl: line 301 is not valid JSON"):
        prepare_dataset(chosen, VOCABULARY, tmp_path / "out")
    assert list(tmp_path.glob(".out.partial/clean/*.json"))
    bad.write_text(Path(corpus["rows"]).read_text(), encoding="utf-8")
    prepare_dataset(chosen, VOCABULARY, tmp_path / "out")


def test_ctrl_c_says_how_to_go_on(corpus: dict[str, str], expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(corpus, out, workers=2)
    while not list(tmp_path.glob(".out.partial/clean/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert f"finished work is kept in {tmp_path / '.out.partial'}; to resume:  gemmule prepare {corpus['text']}" in said
    finish(corpus, out)
    assert content(out) == expected


def test_two_preparations_do_not_write_to_one_place(corpus: dict[str, str], tmp_path: Path) -> None:
    from gemmule.files import directory_lock

    (tmp_path / ".out.partial").mkdir()
    with (
        directory_lock(tmp_path / ".out.partial"),
        pytest.raises(OutputError, match="another process is writing there"),
    ):
        prepare_dataset(settings(corpus), VOCABULARY, tmp_path / "out")


@pytest.mark.slow
def test_ray_makes_the_same_bytes(corpus: dict[str, str], expected: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="ray is not installed: pip install 'gemmule[ray]'")
    process = start(corpus, tmp_path / "out", engine="ray", workers=2)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert content(tmp_path / "out") == expected
