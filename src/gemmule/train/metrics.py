"""What a run writes down while it learns: one JSON object a line; its clock, and what its loss has been lately."""

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

from gemmule.errors import OutputError
from gemmule.files import explained
from gemmule.recipe import Settings


class JsonLines:
    """An append-only file of JSON objects that a resumed run continues exactly where its checkpoint left it.

    While the disk is full, lines wait in memory: a run is worth more than its log.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        """Open `path` and drop everything after the first `keep_bytes` bytes, and a line that is not whole."""
        self._path = path
        self._waiting = b""
        with explained(path):
            path.touch()
            self._written = path.read_bytes()[:keep_bytes].rfind(b"\n") + 1
            self._file: IO[bytes] = path.open("r+b", buffering=0)
            if path.stat().st_size > self._written:  # os.devnull has no end to cut
                self._file.truncate(self._written)

    @property
    def size(self) -> int:
        """Bytes of all lines so far."""
        return self._written + len(self._waiting)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object and hand it to the system, so that a killed run loses at most this line."""
        self._waiting += json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            self._send()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise OutputError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def _send(self) -> None:
        while self._waiting:
            sent = os.pwrite(self._file.fileno(), self._waiting, self._written)
            self._written, self._waiting = self._written + sent, self._waiting[sent:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file, explained(self._path):  # what could not be written is tried once more
            self._send()


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


class Level(Settings):
    """What the loss has been lately: mean and variance over some fifty steps, each step counting less with its age."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def after(self, loss: float) -> "Level":
        """Return the level when one more loss is known."""
        share = max(0.02, 1 / (self.steps + 1))
        off = loss - self.mean
        mean = self.mean + share * off
        return Level(steps=self.steps + 1, mean=mean, variance=(1 - share) * (self.variance + share * off * off))

    def is_spike(self, loss: float) -> bool:
        """Whether a loss lies far above what it has been: by six standard deviations, and by a twentieth at least."""
        return self.steps >= 50 and loss - self.mean > max(6 * math.sqrt(self.variance), 0.05 * self.mean)
