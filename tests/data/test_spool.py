"""Standard input, pipes and FIFOs as sources."""

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from source_files import ROWS, SETTINGS, json_lines, write, write_parquet

from gemmule.data import spool
from gemmule.data.dataset import open_dataset
from gemmule.data.sources import read_source
from gemmule.errors import OutputError, SourceError
from messages import logged


def piped(content: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str | bytes], list[str]]:
    """Return the documents of standard input and what is said."""
    spool.spool.cache_clear()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    with logged() as said:
        documents = [document.text for document in read_source("-", SETTINGS, "train")]
    return documents, said


def test_standard_input_is_told_by_what_it_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    table = write_parquet(tmp_path / "a.parquet", list(ROWS)).read_bytes()
    lines = json_lines(ROWS)
    for content, suffix in [
        (b"<|end|>".join(text.encode() for text in ROWS), ".txt"),
        (lines, ".jsonl"),
        (gzip.compress(lines), ".jsonl.gz"),
        (zstandard.compress(lines), ".jsonl.zst"),
        (json.dumps([{"text": row} for row in ROWS], indent=1).encode(), ".json"),
        (table, ".parquet"),
    ]:
        assert piped(content, monkeypatch) == (ROWS, [f"-: is read as {suffix}"])


def test_text_that_only_looks_like_json_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("{curly} braces", "[note] of this", "7", '"quoted"'):
        assert piped(f"{text}<|end|>two".encode(), monkeypatch)[0] == [text, "two"]


def test_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="-: the stream is empty"):
        piped(b"", monkeypatch)
    spool.spool.cache_clear()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SourceError, match="-: standard input is closed"):
        list(read_source("-", SETTINGS, "train"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
def test_a_full_disk_is_no_fault_of_the_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "standard-input-1").symlink_to("/dev/full")
    monkeypatch.setattr(spool, "_folder", lambda: tmp_path)
    with pytest.raises(OutputError, match="standard-input-1: no space left"):
        piped(b"text" * 10_000, monkeypatch)


def test_a_fifo_is_read_by_the_name_that_it_has(tmp_path: Path) -> None:
    for name, content in (("rows.csv", b"text\none\n"), ("plain", b"one")):
        os.mkfifo(tmp_path / name)
        feeder = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,))
        feeder.start()
        assert [d.text for d in read_source(str(tmp_path / name), SETTINGS, "train")] == ["one"]
        feeder.join()


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
def test_prepare_reads_from_a_pipe(source: str, tmp_path: Path) -> None:
    text = "\n<|endoftext|>\n".join(f"This is story number {n} of {n * n}, told by {n % 7} foxes." for n in range(400))
    command = [
        sys.executable,
        "-m",
        "gemmule",
        "prepare",
        source,
        "--vocab-size",
        "300",
        "--out",
        str(tmp_path / "piped"),
    ]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    ended = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"{source}: is read as .txt" in ended.stderr
    dataset = open_dataset(tmp_path / "piped")
    assert dataset.train.documents + dataset.validation.documents == 400
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_file_of_that_name_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "-.txt", "one")
    assert [d.text for d in read_source("./-.txt", SETTINGS, "train")] == ["one"]
