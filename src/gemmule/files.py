"""Files and folders that are whole or absent: written aside, synced, renamed; and held by one process at a time."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from gemmule.errors import OutputError


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write `path` (no space, not allowed, not there) into an OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"{path}: no space left on the device; free some and try again") from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        # The library reports the system's error as text.
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OutputError(f"{path}: no space left on the device; free some and try again") from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; when the block ends well it is synced and takes the name.

    When it does not, the temporary file is removed and `path` is as it was.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            _sync(aside)
            aside.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):  # it may be absent, or its place not a folder
            aside.unlink()


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; when the block ends well it is synced and takes the name `folder`."""
    aside = folder.with_name(f".{folder.name}.partial")
    with explained(folder):
        aside.mkdir(parents=True, exist_ok=True)  # a process that was killed may have left one
        with held(aside):
            try:
                for leftover in aside.iterdir():
                    _remove(leftover)
                yield aside
                for file in sorted(aside.rglob("*"), reverse=True):
                    _sync(file)
                _sync(aside)
                _put_in_place(aside, folder)
                _sync(folder.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder until the block ends or the process dies; OutputError where another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sentence = "another process is writing there; let it end, or name another folder"
            raise OutputError(f"{folder}: {sentence}") from None
        yield
    finally:
        os.close(handle)


def _put_in_place(aside: Path, folder: Path) -> None:
    """Rename; a folder that is there already makes way, and is only removed when the new one has its name."""
    if not folder.exists():
        aside.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
