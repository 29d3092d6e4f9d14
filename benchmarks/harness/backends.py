"""Backends of a benchmark: how the process of each is started, measured and ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from gemmule.errors import GemmuleError, MissingExtra, UserError
from gemmule.processes import peak_memory_of, python_module_command

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent

# What `gemmule` sets for itself before torch is loaded (processes.py). Peers start without: on a machine that does
# nothing else, they are fastest with threads that wait actively.
OURS_ALONE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class PeerError(UserError):
    """A peer is not installed, or not a peer of this benchmark."""


class Library(NamedTuple):
    """The library of a peer."""

    module: str
    extra: str | None  # of ours that installs it; None where it needs an interpreter of its own
    purpose: str


class Backend(NamedTuple):
    """One implementation under test: a command that takes a job as its last argument, and the job."""

    name: str
    command: list[str]
    job: dict[str, Any]
    ours: bool = False
    # Whether the memory of its child processes is summed, too, as "peak_memory_of_all".
    process_tree: bool = False


def gemmule_backend(name: str, work: str, job: dict[str, Any]) -> Backend:
    """Return the backend of Gemmule itself, which prepares its process as the command line does."""
    return Backend(name, python_module_command("harness.gemmule_runner", work), job, ours=True)


def peer_backend(name: str, program: str, job: dict[str, Any], python: str = sys.executable) -> Backend:
    """Return the backend of a peer: a program of peers/, run by an interpreter that has the peer installed."""
    return Backend(name, [python, str(HERE / "runner.py"), str(HERE / "peers" / f"{program}.py")], job)


def check_library(library: Library, python: str | None) -> None:
    """Raise PeerError or MissingExtra, with the command that installs it, where a peer is not installed."""
    if library.extra is not None:
        if find_spec(library.module) is None:
            raise MissingExtra(library.module, library.extra, library.purpose)
        return
    recipe = (
        f"python -m venv peer && peer/bin/pip install {library.module} torch, then --{library.module}-python "
        "peer/bin/python"
    )
    if python is None:
        raise PeerError(f"{library.purpose} needs an interpreter that has {library.module}: {recipe}")
    try:
        # Not -P, which Python has since 3.11 only: an empty entry is the current directory.
        program = f"import sys; sys.path = [place for place in sys.path if place]; import {library.module}"
        there = subprocess.run([python, "-c", program], capture_output=True, check=False).returncode
    except OSError as error:
        raise PeerError(f"--{library.module}-python {python}: cannot be run: {error.strerror}") from None
    if there != 0:
        raise PeerError(f"--{library.module}-python {python}: has no {library.module}; {recipe}")


def run_backend(backend: Backend) -> dict[str, Any]:
    """Run a backend in a process group of its own, and end the group; return its measurement with the peak memory.

    Adds "began", the time at which the process was started, and "peak_memory" in bytes (Linux; None elsewhere). Raises
    GemmuleError with the last line of the process's standard error where it fails.
    """
    environment = _environment(backend)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        began = time.time()
        process = subprocess.Popen(
            [*backend.command, json.dumps(backend.job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            text=True,
            env=environment,
        )
        watch = ProcessTreeWatch(process.pid) if backend.process_tree else None
        try:
            measurement = _measurement(process)
            if measurement is not None:
                measurement |= {"began": began, "peak_memory": peak_memory_of(process.pid)}
                measurement |= {"peak_memory_of_all": watch.peak} if watch else {}
            process.communicate()
        finally:
            _end(process)
        if measurement is None or process.returncode:
            errors.seek(0)
            last = [line for line in errors.read().splitlines() if line.strip()][-1:] or ["no message"]
            raise GemmuleError(f"{backend.name} ended with exit code {process.returncode}: {last[0].strip()}")
    return measurement


def _environment(backend: Backend) -> dict[str, str]:
    """Return the variables of a backend's process: only Gemmule's finds this package, and keeps its thread settings."""
    if not backend.ours:
        return {key: value for key, value in os.environ.items() if key not in OURS_ALONE}
    paths = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _measurement(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """Read up to the line of the measurement, past what libraries print."""
    out: IO[str] | None = process.stdout
    assert out is not None
    for line in out:
        if line.startswith('{"measurement": '):
            found: dict[str, Any] = json.loads(line)["measurement"]
            return found
    return None


class ProcessTreeWatch:
    """Samples the memory of a process and its descendants ten times per second, until it ends (Linux)."""

    def __init__(self, number: int) -> None:
        self.peak = 0
        self._number = number
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while present := process_tree_memory(self._number):
            self.peak = max(self.peak, present)
            time.sleep(0.1)


def process_tree_memory(number: int) -> int:
    """Return the resident bytes of a process and its descendants, shared pages counted once per process."""
    total, waiting = 0, [number]
    while waiting:
        number = waiting.pop()
        with suppress(OSError, IndexError):  # it has ended
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return total


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill a process and its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
