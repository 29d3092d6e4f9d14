"""Sources that are written to a folder, and read."""

import json
from pathlib import Path

import pytest

from gemmule.data.settings import DataSettings
from gemmule.data.sources import read_source

SETTINGS = DataSettings(train="unused", separator="<|end|>")
ROWS = ["first story", "", "third\nstory with caf\u00e9"]


def texts(source: Path | str, settings: DataSettings = SETTINGS) -> list[str | bytes]:
    return [document.text for document in read_source(str(source), settings, "train")]


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def json_lines(rows: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, column: row}) + "\n" for n, row in enumerate(rows)).encode()


def write_parquet(file: Path, rows: list[str | None], column: str = "text") -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"id": list(range(len(rows))), column: rows}), file, row_group_size=2)
    return file
