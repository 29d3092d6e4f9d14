"""Preparing a corpus, side by side: raw text to token shards, beside `datasets.map` with the same tokenizer."""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemmule.bench.models import read_once
from gemmule.bench.rounds import Answers, Effort, Progress, machine, ratios, run_rounds, spread
from gemmule.bench.sides import Library, check_library, our_side, peer_side
from gemmule.bench.stage import Made
from gemmule.data.engines import available_cores
from gemmule.data.prepare import prepare_dataset
from gemmule.data.settings import DataSettings
from gemmule.data.storybook import stories
from gemmule.errors import SourceError
from gemmule.tokenizer import TokenizerSettings
from gemmule.tokenizer.training import train_tokenizer

SEPARATOR = "\n<|endoftext|>\n"
PEERS: dict[str, tuple[str, Library]] = {
    "transformers": (
        "transformers_prepare",
        Library("datasets", "sources", "comparing with datasets and transformers"),
    ),
}


def compare_preparing(
    text: Path | None, megabytes: float, peers: Sequence[str], effort: Effort, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Measure seconds and memory of all processes together, on a corpus repeated and perturbed from a text file.

    Each side gets the form that it reads best: we a text file, `datasets` the rows of a Parquet file. `folder` is for
    all of it. Without a file, the storybook is the text.
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
        "bytes": read_once(corpus), "workers": available_cores(), **effort._asdict(),
    }  # fmt: skip
    ours = our_side("gemmule", "prepare", job)._replace(family=True)
    sides = [ours, *(peer_side(name, PEERS[name][0], job)._replace(family=True) for name in peers)]
    return summary(job, run_rounds(sides, effort.rounds, progress))


def make(job: dict[str, Any]) -> Made:
    """Prepare the corpus as `gemmule prepare` does; making is the work."""
    out = Path(job["folder"]) / f"prepared-{time.time_ns()}"
    data = DataSettings.model_validate({"train": job["corpus"]})
    tokenizer = TokenizerSettings(path=job["tokenizer"])
    dataset = prepare_dataset(data, tokenizer, out, lambda *_: None, workers=job["workers"], say=lambda _: None)
    return None, {"ended": time.time(), "documents": dataset.train.documents, "tokens": dataset.train.tokens}


def summary(job: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """Put the answers together: seconds from the start of a process, megabytes a second, and theirs over ours."""
    seconds = {name: [one["ended"] - one["began"] for one in rounds] for name, rounds in answers.items()}
    rates = {name: [job["bytes"] / 1e6 / value for value in values] for name, values in seconds.items()}
    sides = {
        name: {
            "seconds": spread(seconds[name]),
            "megabytes_per_second": spread(rates[name]),
            "peak_memory": max(one["peak_memory_of_all"] for one in rounds),
            **{key: rounds[0][key] for key in ("documents", "tokens", "versions") if key in rounds[0]},
        }
        for name, rounds in answers.items()
    }
    settings = {key: job[key] for key in ("bytes", "workers", "rounds")}
    return {
        "bench": "prepare",
        "machine": machine(),
        "settings": settings,
        "sides": sides,
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
    """Repeat documents, each time with a tenth of the words drawn anew from the same document."""
    draw, left = random.Random(0), megabytes * 1e6
    with out.open("w", encoding="utf-8") as file:
        while left > 0:
            words = draw.choice(documents).split(" ")
            for _ in range(max(1, len(words) // 10)):
                words[draw.randrange(len(words))] = draw.choice(words)
            left -= len((" ".join(words) + SEPARATOR).encode())
            file.write(" ".join(words) + SEPARATOR)


def write_parquet(text: Path, out: Path) -> None:
    """Put the documents of a text file into the rows of a Parquet file."""
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
