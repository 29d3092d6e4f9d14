"""The training clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
