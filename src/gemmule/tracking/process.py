"""Tracking services as trackers of a run: each in a process of its own, which reads the run's logs by itself.

Training hands over nothing and waits for nothing: the run folder is the queue, on disk, between it and the services. So
no service can slow a step, no memory grows where one hangs, and what was not sent can be sent later.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemmule.errors import TrackingError
from gemmule.processes import python_module_command
from gemmule.run_folder import RunFolder
from gemmule.tracking.services import SERVICES, require_library

log = logging.getLogger(__name__)

# Seconds that the end of a run waits for its services, and that a run waits before it starts a failed process again;
# that time doubles with each failure.
FINISH_SECONDS, _RETRY_SECONDS = 2.0, 60.0


class ServiceProcess:
    """Follows a run in a process of its own; a failure of the service is one warning, and is tried again later."""

    def __init__(self, name: str) -> None:
        """Name a service; MissingExtra where its library is not installed."""
        require_library(name)
        self._name = name
        self._process: _Process | None = None
        self._warned, self._retry_seconds, self._retry_at, self._end = False, _RETRY_SECONDS, 0.0, 0.0

    def start(self, run: RunFolder, step: int) -> None:  # noqa: ARG002 - the process knows which step was sent last
        """Start the process."""
        self._run = run
        self._process = _Process(self._name, run)

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:  # noqa: ARG002 - they are in the run folder
        """See whether the process lives."""
        if self._process is None and time.monotonic() >= self._retry_at:
            self._process = _Process(self._name, self._run)
        elif self._process is not None:
            ended = self._process.ended
            self._read(self._process)
            if ended:
                self._fail(self._process, self._process.failure or "its process ended early")

    def log_text(self, name: str, text: str, step: int) -> None:
        """Do nothing: the process reads samples.jsonl."""

    def log_image(self, name: str, png: Path, step: int) -> None:
        """Do nothing: the process sends the loss curves at the end."""

    def stop(self) -> None:
        """Let the process send the rest and end."""
        self._end = time.monotonic() + FINISH_SECONDS
        if self._process is not None:
            self._process.let_end()

    def finish(self) -> None:
        """Wait for the end of the process, until FINISH_SECONDS after `stop`, and kill it then."""
        if self._process is None:
            return
        in_time = self._process.wait(max(0.0, self._end - time.monotonic()))
        self._read(self._process)
        failure = self._process.failure if in_time else f"had not taken everything {FINISH_SECONDS:g} s after the end"
        if failure is not None:
            self._fail(self._process, failure)
        else:
            self._process.close()

    def _read(self, process: "_Process") -> None:
        for message in process.messages():
            if url := message.get("url"):
                log.info(f"{SERVICES[self._name].title}: {url}")

    def _fail(self, process: "_Process", reason: str) -> None:
        """Warn, once in a run, and start again later."""
        process.close()
        self._process = None
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds *= 2
        if not self._warned:
            log.warning(
                f"tracking.to = {self._name}: {reason}; the run continues, and metrics.jsonl has all; send the rest "
                f"with:  {shlex.join(['gemmule', 'report', '--send', self._name, str(self._run.path)])}"
            )
        self._warned = True


def send(run: RunFolder, name: str) -> str:
    """Send what a run has and a service has not, and return what was sent in a sentence.

    TrackingError where there is no such service or no such run, or where the service fails.
    """
    if name not in SERVICES:
        raise TrackingError(f"--send {name}: no such service; there are {', '.join(SERVICES)}")
    require_library(name)
    if not run.metrics.is_file() or not run.recipe.is_file():
        raise TrackingError(f"{run.path}: is no run folder with metrics to send")
    process, done = _Process(name, run, "--once"), dict[str, Any]()
    try:
        process.wait(None)
        for message in process.messages():
            done |= message
    finally:
        process.close()
    if process.failure is not None:
        raise TrackingError(f"{SERVICES[name].title}: {process.failure}")
    place = f", {done['url']}" if done.get("url") else ""
    return f"{SERVICES[name].title}: sent {done['steps']:,} logged steps, up to step {done['last']:,}{place}"


class _Process:
    """A process that runs gemmule.tracking.sender, and what it has said."""

    def __init__(self, name: str, run: RunFolder, *options: str) -> None:
        command = python_module_command("gemmule.tracking.sender", name, str(run.path), *options)
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._child.stdin is not None and self._child.stdout is not None  # noqa: PT018 - pipes were asked for
        self._input, self._output = self._child.stdin, self._child.stdout
        os.set_blocking(self._output.fileno(), False)
        self._buffer, self._failure = b"", ""

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what it has said since the last time, without waiting."""
        with suppress(BlockingIOError):
            while not self._output.closed and (said := os.read(self._output.fileno(), 65_536)):
                *lines, self._buffer = (self._buffer + said).split(b"\n")
                for message in map(json.loads, lines):
                    self._failure = message.get("failed", self._failure)
                    yield message

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._child.poll() is not None

    @property
    def failure(self) -> str | None:
        """Why it ended, once its messages are read; None where all was sent."""
        code = self._child.returncode
        if code == 0:
            return None
        return self._failure or (f"its process was ended by signal {-code}" if code < 0 else "its process ended")

    def let_end(self) -> None:
        """Let it know that the run has ended."""
        self._input.close()

    def wait(self, seconds: float | None) -> bool:
        """Wait for its end; return whether it came in time."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)
        return self.ended

    def close(self) -> None:
        """Kill it where it lives, with what it has started, and close the pipes."""
        if not self.ended:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._input.close()
        self._output.close()
