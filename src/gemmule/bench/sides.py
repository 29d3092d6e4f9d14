"""A side of a comparison: what runs it, how it is started, watched and stopped."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

from gemmule.errors import GemmuleError, MissingExtra, PeerError

HERE = Path(__file__).parent

# What `gemmule` sets for itself before torch is loaded (cli/main.py). Peers start without: on a machine that does
# nothing else, threads that wait actively are what suits them best.
OURS_ALONE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class Library(NamedTuple):
    """What a peer needs."""

    module: str
    extra: str | None  # of ours that installs it; None where it needs an interpreter of its own
    purpose: str


class Side(NamedTuple):
    """One of those compared: a command that ends with a job's JSON, and the job."""

    name: str
    command: list[str]
    job: dict[str, Any]
    ours: bool = False
    # Whether the memory of the processes that it starts is counted too, in "peak_memory_of_all".
    family: bool = False


def our_side(name: str, work: str, job: dict[str, Any]) -> Side:
    """Return a side of Gemmule's own, started as a user starts it, so that what the command line sets up counts."""
    return Side(name, [sys.executable, "-m", "gemmule", "bench", work, "--job"], job, ours=True)


def peer_side(name: str, program: str, job: dict[str, Any], python: str = sys.executable) -> Side:
    """Return a peer's side: a program of peers/, run by an interpreter that has the peer."""
    return Side(name, [python, str(HERE / "stage.py"), str(HERE / "peers" / f"{program}.py")], job)


def check_library(library: Library, python: str | None) -> None:
    """Raise PeerError or MissingExtra, saying how to install it, where a peer is not there."""
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
        there = subprocess.run([python, "-c", f"import {library.module}"], capture_output=True, check=False).returncode
    except OSError as error:
        raise PeerError(f"--{library.module}-python {python}: cannot be run: {error.strerror}") from None
    if there != 0:
        raise PeerError(f"--{library.module}-python {python}: has no {library.module}; {recipe}")


def run_side(side: Side) -> dict[str, Any]:
    """Run a side in a process group of its own, of which nothing is left after; return its answer and peak memory.

    Adds "began", the clock when the process was started, and "peak_memory" in bytes (of Linux; None elsewhere). Raises
    GemmuleError with the process's last words where it fails.
    """
    environment = {key: value for key, value in os.environ.items() if side.ours or key not in OURS_ALONE}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        began = time.time()
        process = subprocess.Popen(
            [*side.command, json.dumps(side.job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
            text=True,
            env=environment,
        )
        watch = FamilyWatch(process.pid) if side.family else None
        try:
            answer = _answer(process)
            if answer is not None:
                answer |= {"began": began, "peak_memory": _peak_memory(process.pid)}
                answer |= {"peak_memory_of_all": watch.peak} if watch else {}
            process.communicate()
        finally:
            _end(process)
        if answer is None or process.returncode:
            complaints.seek(0)
            last = [line for line in complaints.read().splitlines() if line.strip()][-1:] or ["it said nothing"]
            raise GemmuleError(f"{side.name} ended with exit code {process.returncode}: {last[0].strip()}")
    return answer


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """Read up to the line that is the answer; libraries print too."""
    out: IO[str] | None = process.stdout
    assert out is not None
    for line in out:
        if line.startswith('{"answer": '):
            found: dict[str, Any] = json.loads(line)["answer"]
            return found
    return None


def _peak_memory(number: int) -> int | None:
    """Return the most memory that a process has had; rusage would count what its parent had before."""
    with suppress(OSError):
        for line in Path(f"/proc/{number}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


class FamilyWatch:
    """Looks ten times a second at the memory of a process and of all below it, until it has ended (Linux)."""

    def __init__(self, number: int) -> None:
        self.peak = 0
        self._number = number
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while present := family_memory(self._number):
            self.peak = max(self.peak, present)
            time.sleep(0.1)


def family_memory(number: int) -> int:
    """Return the resident bytes of a process and of all below it, shared pages counted once for each."""
    total, waiting = 0, [number]
    while waiting:
        number = waiting.pop()
        with suppress(OSError, IndexError):  # it has ended
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return total


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill what is left of a process and of all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that no process is left behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
