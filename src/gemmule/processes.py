"""This process's settings, signals and memory, and child processes that run Python."""

import atexit
import ctypes
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn


def prepare_process() -> None:
    """Set what torch's threads and memory need, before it is loaded."""
    # Neither processes of multiprocessing nor others in Python look for modules in the current directory.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    # While torch is loaded, objects come and stay: to look through all of them at each 700th takes a fifth of a second.
    gc.set_threshold(100_000)
    # And once more at the end, when all of it goes anyway: a third of a second that the user waits for the prompt.
    atexit.register(gc.freeze)
    # Torch's threads spin while they wait for each other; on a machine that does something else too, a step then takes
    # ten times as long. Without any spinning it takes a tenth longer on one that does not.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Let glibc keep what torch frees: else each large tensor is paid for again, page by page, a fifth of a step.
    try:
        settings = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    settings(mmap_max, 0)
    settings(trim_threshold, -1)


def python_module_command(name: str, *arguments: str) -> list[str]:
    """Return the command that runs an installed module, by this interpreter.

    With -P the current directory is not on its sys.path: a `transformers.py` in a downloaded folder is not imported.
    """
    return [sys.executable, "-P", "-m", name, *arguments]


def peak_memory() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    peak = peak_memory_of("self")
    if peak is None:  # macOS; ru_maxrss of a child on Linux begins at what its parent had
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


def peak_memory_of(process: int | Literal["self"]) -> int | None:
    """Return the largest resident memory that a process has had, in bytes; None where it ended or there is no /proc."""
    return _proc_status("VmHWM", process)


def resident_memory() -> int | None:
    """Return the resident memory of this process now, in bytes; None where there is no /proc."""
    return _proc_status("VmRSS", "self")


def physical_memory() -> int | None:
    """Return the bytes of memory that this machine has; None where the system does not say."""
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _proc_status(field: str, process: int | Literal["self"]) -> int | None:
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), None)


def exit_without_finalization(code: int) -> NoReturn:
    """End this process as multiprocessing ends its own: exit functions and flushed output, no interpreter shutdown.

    A thread of a gloo process group that drops its last tensor while the interpreter shuts down aborts the process.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # reported already
            stream.flush()
    os._exit(code)


_LATER = 0.02  # seconds until a signal whose exception was ignored is sent again


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the block with an exception, as Ctrl-C does, so that no process or temporary file is left.

    Either is raised again where Python ignored it, as it does in callbacks of the garbage collector. Where something
    else handles or ignores SIGTERM already, or outside the main thread, nothing is changed.
    """
    main, ignored_before = threading.main_thread(), sys.unraisablehook

    def raise_again(ignored: "sys.UnraisableHookArgs") -> None:
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            ignored_before(ignored)
            return
        number = signal.SIGINT
        if isinstance(ignored.exc_value, Terminated):
            number = signal.SIGTERM
            signal.signal(number, terminate)
        # Later, since this is called from within the callback.
        timer = threading.Timer(_LATER, signal.pthread_kill, (main.ident, number))
        timer.daemon = True
        timer.start()

    def terminate(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the cleaning
        raise Terminated

    if threading.current_thread() is not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = ignored_before
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
