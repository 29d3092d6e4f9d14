"""Preparation of a corpus: raw text to token shards, compared with `datasets.map` and the same tokenizer."""

import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemmule.data.engines import available_cores
from gemmule.data.prepare import prepare_dataset
from gemmule.data.settings import DataSettings
from gemmule.errors import SourceError
from gemmule.processes import python_module_command
from gemmule.storybook import stories
from gemmule.tokenizer import TokenizerSettings
from gemmule.tokenizer.training import train_tokenizer
from harness.backends import Library, check_library, gemmule_backend, peer_backend
from harness.models import read_once
from harness.runner import Workload
from harness.trials import Budget, Measurements, Progress, machine, ratios, run_trials, spread

SEPARATOR = "\n<|endoftext|>\n"
PEERS: dict[str, tuple[str, Library]] = {
    "transformers": (
        "transformers_prepare",
        Library("datasets", "sources", "comparing with datasets and transformers"),
    ),
}


def compare_preparing(
    text: Path | None,
    megabytes: float,
    peers: Sequence[str],
    budget: Budget,
    folder: Path,
    progress: Progress,
    kills: int = 0,
) -> dict[str, Any]:
    """Measure seconds and memory of all processes together, on a corpus repeated and perturbed from a text file.

    Each backend reads the format that is fastest for it: Gemmule a text file, `datasets` a Parquet file, both in
    `folder`. Without a file, the text is the storybook. With `kills`, the corpus is prepared once more and killed so
    many times.
    """
    for name in peers:
        check_library(Library("transformers", "parity", PEERS[name][1].purpose), None)
        check_library(PEERS[name][1], None)
    corpus, tokenizer = folder / "corpus.txt", folder / "tokenizer"
    documents = read_documents(text) if text else [story.text for story in stories(2000, seed=0)]
    write_corpus(documents, corpus, megabytes)
    tokenizer.mkdir()
    train_tokenizer(documents[:5000], 2048).save(tokenizer)
    rows = folder / "corpus.parquet"
    if peers:
        write_parquet(corpus, rows)
    job = {
        "corpus": str(corpus), "rows": str(rows), "tokenizer": str(tokenizer / "tokenizer.json"), "folder": str(folder),
        "bytes": read_once(corpus), "workers": available_cores(), **budget._asdict(),
    }  # fmt: skip
    ours = gemmule_backend("gemmule", "prepare", job)._replace(process_tree=True)
    backends = [ours, *(peer_backend(name, PEERS[name][0], job)._replace(process_tree=True) for name in peers)]
    found = summary(job, run_trials(backends, budget.trials, progress))
    if kills:
        progress("a preparation that is killed and resumed", 0, None)
        found |= resume_after_kills(folder, found["backends"]["gemmule"]["seconds"]["median"], kills)
    return found


def resume_after_kills(folder: Path, seconds: float, kills: int) -> dict[str, Any]:
    """Prepare the corpus once more under `kill -9`, about `seconds` long; compare it with the first dataset."""
    out = folder / "killed"
    command = python_module_command("gemmule", "prepare", str(folder / "corpus.txt"), "--out", str(out))
    command += ["--tokenizer", str(folder / "tokenizer")]
    draw, times = random.Random(kills), list[float]()
    for _ in range(kills):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        times.append(round(draw.uniform(0.1, 0.8) * seconds / kills, 1))
        try:
            process.wait(times[-1])
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not out.exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    same = digest(out) == digest(next(folder.glob("prepared-*")))
    return {"killed_after_seconds": times, "killed_and_resumed_is_byte_identical": same}


def digest(folder: Path) -> str:
    """Return one hash of all files of a folder."""
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        whole.update(file.name.encode())
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def setup(job: dict[str, Any]) -> Workload:
    """Prepare the corpus as `gemmule prepare` does; the setup is what is measured."""
    out = Path(job["folder"]) / f"prepared-{time.time_ns()}"
    data = DataSettings.model_validate({"train": job["corpus"]})
    tokenizer = TokenizerSettings(path=job["tokenizer"])
    dataset = prepare_dataset(data, tokenizer, out, lambda *_: None, workers=job["workers"])
    return None, {"ended": time.time(), "documents": dataset.train.documents, "tokens": dataset.train.tokens}


def summary(job: dict[str, Any], measurements: Measurements) -> dict[str, Any]:
    """Summarize the measurements: seconds from the start of a process, megabytes per second, and the speedup."""
    seconds = {name: [one["ended"] - one["began"] for one in trials] for name, trials in measurements.items()}
    rates = {name: [job["bytes"] / 1e6 / value for value in values] for name, values in seconds.items()}
    backends = {
        name: {
            "seconds": spread(seconds[name]),
            "megabytes_per_second": spread(rates[name]),
            "peak_memory": max(one["peak_memory_of_all"] for one in trials),
            **{key: trials[0][key] for key in ("documents", "tokens", "versions") if key in trials[0]},
        }
        for name, trials in measurements.items()
    }
    settings = {key: job[key] for key in ("bytes", "workers", "trials")}
    return {
        "bench": "prepare",
        "machine": machine(),
        "settings": settings,
        "backends": backends,
        "ratios": ratios(rates, "gemmule"),
    }


def read_documents(text: Path) -> list[str]:
    """Return the documents of a text file."""
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"--text {text}: cannot be read: {error.strerror}") from None
    return [part.strip() for part in content.split("<|endoftext|>") if part.strip()]


def write_corpus(documents: Sequence[str], out: Path, megabytes: float) -> None:
    """Repeat documents, each time with a tenth of the words resampled from the same document."""
    draw, left = random.Random(0), megabytes * 1e6
    with out.open("w", encoding="utf-8") as file:
        while left > 0:
            words = draw.choice(documents).split(" ")
            for _ in range(max(1, len(words) // 10)):
                words[draw.randrange(len(words))] = draw.choice(words)
            left -= len((" ".join(words) + SEPARATOR).encode())
            file.write(" ".join(words) + SEPARATOR)


def write_parquet(text: Path, out: Path) -> None:
    """Write the documents of a text file as rows of a Parquet file."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    schema = arrow.schema([("text", arrow.string())])
    rows: list[str] = []
    with parquet.ParquetWriter(out, schema) as table:
        for document in _documents(text):
            rows.append(document)
            if len(rows) == 50_000:
                table.write_table(arrow.table({"text": rows}, schema))
                rows.clear()
        if rows:
            table.write_table(arrow.table({"text": rows}, schema))


def _documents(text: Path) -> Iterator[str]:
    document: list[str] = []
    with text.open(encoding="utf-8") as file:
        for line in file:
            if line == SEPARATOR.lstrip():
                yield "".join(document).strip()
                document = []
            else:
                document.append(line)
