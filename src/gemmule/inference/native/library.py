"""Shared libraries of C files: compiled by the machine's C compiler when they are first needed, cached per user.

A cached file is code that will run, so only one that belongs to this user, that nobody else can write, and whose
content is that which was compiled is loaded. Its name ends with a hash of its content, by which a file that was cut
short is noticed; loading that would kill the process.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gemmule.code_cache import WRITABLE_BY_OTHERS, cache_folder
from gemmule.files import sha256, sync

SOURCE = Path(__file__).with_name("step.c")
# Results are those of the source alone: sums keep their order, and no product is rounded together with a sum unless the
# source says so.
FLAGS: tuple[str, ...] = ("-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
OPENMP = "-fopenmp"
OPTIONAL = (OPENMP, "-mprefer-vector-width=512")  # that not every compiler has
TIMEOUT = 120  # seconds, per run of the compiler
# Without OpenMP a step uses one core. It may be installed later, so such a file is used for a day, in seconds.
SERIAL, SERIAL_LIFETIME = "slow", 24 * 60 * 60

_PARTIAL = ".partial-"


@functools.cache
def load_library(source: Path | None = None) -> "ctypes.CDLL | str":
    """Return the shared library of a C file, from the user's cache folder where it is cached; or why there is none.

    It is that of `step.c` where no other is given.
    """
    given = os.environ.get("CC", "").strip() or "cc"
    try:
        words = shlex.split(given)
    except ValueError as error:
        return f"CC = {given!r} is not a command: {error}"
    compiler = shutil.which(words[0])
    if compiler is None:
        return f"no C compiler ({words[0]}) was found"
    try:
        return _load([compiler, *words[1:]], source or SOURCE)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip() or str(error)
    except subprocess.TimeoutExpired:
        reason = f"it took longer than {TIMEOUT} seconds"
    except OSError as error:
        reason = str(error)
    return f"{given} did not compile it: {reason.splitlines()[0]}"


def _load(compiler: list[str], source: Path) -> ctypes.CDLL:
    # What the compiler knows of this processor, and of itself: a folder may be shared by different machines.
    target = _run(*compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull)
    recipe = source.read_bytes() + repr((compiler[1:], FLAGS, OPTIONAL)).encode() + target
    name = f"{source.stem}-{hashlib.blake2b(recipe, digest_size=12).hexdigest()}"
    folder = cache_folder()
    for file in _cached(folder, name) if folder else ():
        try:
            return ctypes.CDLL(str(file))
        except OSError:  # made on a machine with another C library
            continue
    with tempfile.TemporaryDirectory() as private:  # only this user may look into it
        fresh = Path(private) / f"{name}.so"
        has_openmp = _compile(compiler, fresh, source)
        stored = _store(fresh, folder, name if has_openmp else f"{name}-{SERIAL}") if folder else None
        return ctypes.CDLL(str(stored or fresh))


def _cached(folder: Path, name: str) -> Iterator[Path]:
    """Yield the cached libraries that may be loaded, those with OpenMP first; remove damaged and outdated ones."""
    for file in sorted(folder.glob(f"{name}-*.so")):
        with suppress(OSError):
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & WRITABLE_BY_OTHERS:
                continue
            outdated = f"-{SERIAL}-" in file.name and time.time() - status.st_mtime > SERIAL_LIFETIME
            if outdated or sha256(file) != file.stem.rpartition("-")[2]:
                file.unlink()
            else:
                yield file


def _store(fresh: Path, folder: Path, name: str) -> Path | None:
    """Copy a library into the cache by an atomic write; None where that fails, as on a full disk."""
    try:
        for leftover in folder.glob(f"{_PARTIAL}*"):  # of processes that were killed
            if time.time() - leftover.lstat().st_mtime > 60 * 60:
                leftover.unlink()
        handle, partial = tempfile.mkstemp(dir=folder, prefix=_PARTIAL)
    except OSError:
        return None
    try:
        with os.fdopen(handle, "wb") as copy:
            copy.write(fresh.read_bytes())
        sync(Path(partial))
        return Path(partial).replace(folder / f"{name}-{sha256(fresh)}.so")
    except OSError:
        Path(partial).unlink(missing_ok=True)
        return None


def _compile(compiler: list[str], target: Path, source: Path) -> bool:
    """Compile with as many of the optional flags as the compiler knows; return whether OpenMP is one of them."""
    for count in range(len(OPTIONAL), -1, -1):
        optional = OPTIONAL[:count]
        try:
            _run(
                *compiler,
                *FLAGS,
                *optional,
                "-std=gnu11",
                "-D_GNU_SOURCE",
                "-shared",
                "-fPIC",
                str(source),
                "-o",
                str(target),
                "-lm",
            )
            break
        except subprocess.CalledProcessError:
            if not count:
                raise
    return OPENMP in optional


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT).stdout
