"""Files and folders that are whole or absent: written aside, synced, renamed; and held by one process at a time."""

import errno
import fcntl
import hashlib
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
        # NumPy counts what it could write instead of asking the system why: "400 requested and 195 written".
        if error.errno == errno.ENOSPC or (error.errno is None and "requested and" in str(error)):
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
            sync(aside)
            aside.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):  # it may be absent, or its place not a folder
            aside.unlink()


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; when the block ends well it is synced and takes the name `folder`."""
    aside = aside_of(folder)
    with explained(folder):
        aside.mkdir(parents=True, exist_ok=True)  # a process that was killed may have left one
        with held(aside):
            try:
                for leftover in aside.iterdir():
                    _remove(leftover)
                yield aside
                put_in_place(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


def aside_of(folder: Path) -> Path:
    """Return the temporary folder in which the content of `folder` is written first."""
    return folder.with_name(f".{folder.name}.partial")


def put_in_place(aside: Path, folder: Path) -> None:
    """Sync what was written aside and give it the name `folder`; what had it makes way, and is removed after that."""
    with explained(folder):
        for file in sorted(aside.rglob("*"), reverse=True):
            sync(file)
        sync(aside)
        _exchange(aside, folder)
        sync(folder.parent)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def _exchange(aside: Path, folder: Path) -> None:
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
