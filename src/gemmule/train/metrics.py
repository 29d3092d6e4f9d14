"""What a run writes down while it learns: one JSON object a line."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

from gemmule.files import explained


class JsonLines:
    """An append-only file of JSON objects that a resumed run continues exactly where its checkpoint left it."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        """Open `path` and drop everything after the first `keep_bytes` bytes, and a line that is not whole."""
        self._path = path
        with explained(path):
            path.touch()
            whole = path.read_bytes()[:keep_bytes].rfind(b"\n") + 1
            self._file: IO[bytes] = path.open("r+b")
            self._file.truncate(whole)
            self._file.seek(0, 2)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object and hand it to the system, so that a killed run loses at most this line."""
        with explained(self._path):
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with explained(self._path):  # what could not be written is tried once more
            self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read what JsonLines wrote; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]


class Stopwatch:
    """Time spent training, without the pauses for validation, samples and checkpoints."""

    def __init__(self, seconds: float = 0.0) -> None:
        """Start running with some `seconds` on the clock."""
        self._started = time.perf_counter() - seconds
        self._stopped: float | None = None
        self._tokens = 0
        self._mark = seconds

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return (self._stopped or time.perf_counter()) - self._started

    def add(self, tokens: int) -> None:
        """Count the tokens of a finished step."""
        self._tokens += tokens

    def rate(self) -> float:
        """Return tokens per second since the last call."""
        now = self.seconds
        rate = self._tokens / max(now - self._mark, 1e-9)
        self._tokens, self._mark = 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out: the clock stands still in it."""
        self._stopped = began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began
            self._stopped = None
