"""Atomic writes and directory locks: a file or folder is written under a temporary name, synced, then renamed.

Temporary names are predictable (`.NAME.partial`), so that what a killed process left is found and replaced. A link or
another user's folder under such a name is never followed or written to.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from gemmule.errors import OutputError

# Errors of file systems without flock or fsync.
_UNSUPPORTED = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

_REASONS = {
    errno.ENOSPC: "no space left on the device; free some and try again",
    errno.EDQUOT: "cannot be written: the disk quota is exceeded; free some space and try again",
    errno.EFBIG: "cannot be written: larger than the file system, or the shell's `ulimit -f`, allows",
}


class _OccupiedError(OutputError):
    """Another program wrote into the output folder meanwhile."""


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Raise an OSError inside the block as an OutputError that names the file and the cause."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = os_error_of(error)
        if cause is None:
            raise
        shown = path
        if isinstance(cause.filename, str | os.PathLike):
            named = Path(cause.filename)
            if not named.absolute().is_relative_to(path.absolute().parent):  # not the output, nor a temporary file
                shown = named
        raise OutputError(f"{shown}: {reason_of(cause)}") from error


def os_error_of(error: BaseException) -> OSError | None:
    """Return the OSError that caused an exception, or None where there is none."""
    if isinstance(error, SafetensorError):  # reports it as text
        found = re.search(r"os error (\d+)", str(error))
        return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None
    if not isinstance(error, OSError):
        return None
    # NumPy counts what it could write instead of asking the system why: "400 requested and 195 written".
    if error.errno is None and "requested and" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error


def reason_of(error: OSError) -> str:
    """Return the reason for a failed write as a clause, with a remedy where there is one."""
    return _REASONS.get(error.errno or 0) or f"cannot be written: {error.strerror or error}"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary file, then fsync it and rename it to `path`.

    When the block raises, the temporary file is removed and `path` stays as it was. OutputError where another process
    is writing the same file.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _create_locked(temporary)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):  # renamed by now, or never created by the block
                temporary.unlink()
            os.close(handle)


def _create_locked(temporary: Path) -> int:
    """Create and lock a temporary file, replacing the stale one of a killed process; return its handle."""
    while True:
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            _lock(handle, temporary)
            return handle
        except FileExistsError:
            if stat.S_ISREG(temporary.lstat().st_mode):
                stale = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    _lock(stale, temporary)  # refused while its writer lives
                    temporary.unlink(missing_ok=True)
                finally:
                    os.close(stale)
            else:
                temporary.unlink()  # a link somebody put there; a folder is refused by the system


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False, last: str = "") -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, then fsync it and rename it to `folder`.

    Without `replace`, files that another program wrote into `folder` meanwhile are kept, and OutputError names the
    temporary folder that holds the finished output. `last` is the file that marks the folder as complete; it is moved
    last where the files can only be moved one by one.
    """
    temporary = partial_folder(folder)
    with as_output_error(folder):
        create_temporary_folder(temporary)
        with directory_lock(temporary):
            for leftover in temporary.iterdir():
                remove(leftover)
            kept = False
            try:
                yield temporary
                atomic_replace(temporary, folder, replace=replace, last=last)
            except _OccupiedError:
                kept = True
                raise
            finally:
                if not kept:
                    shutil.rmtree(temporary, ignore_errors=True)


def partial_folder(folder: Path) -> Path:
    """Return the temporary folder for writing `folder`, on the same file system."""
    target = _target(folder)
    return target / ".partial" if _is_filled_in_place(target) else target.with_name(f".{target.name}.partial")


def create_temporary_folder(temporary: Path) -> None:
    """Create a temporary folder, or reuse this user's own; OutputError for a link or another user's folder."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
    except FileExistsError:
        status = temporary.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            kind = "another user's folder" if stat.S_ISDIR(status.st_mode) else "no folder"
            raise OutputError(f"{temporary}: is {kind}, where a temporary folder is needed; remove it") from None


def atomic_replace(temporary: Path, folder: Path, *, replace: bool = False, last: str = "") -> None:
    """Fsync a temporary folder and rename it to `folder`.

    With `replace` an existing folder is removed after the rename; otherwise OutputError keeps both. A mount point or
    the current directory cannot be renamed: files are moved into it one by one, `last` after the others.
    """
    target = _target(folder)
    with as_output_error(folder):
        for file in sorted(temporary.rglob("*"), reverse=True):
            sync(file)
        sync(temporary)
        try:
            if _is_filled_in_place(target):
                _move_into(temporary, target, replace, last)
            elif replace:
                _exchange(temporary, target)
            else:
                temporary.rename(target)  # which the system allows where nothing is, or an empty folder
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                sentence = f"another program wrote into it meanwhile; the finished output is kept in {temporary}"
                raise _OccupiedError(f"{folder}: {sentence}") from None
            raise
        sync(target if _is_filled_in_place(target) else target.parent)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a symbolic link (not its target), or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def directory_lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder (flock) inside the block; OutputError where another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sentence = "another process is writing there; let it end, or name another folder"
        raise OutputError(f"{path}: {sentence}") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _target(folder: Path) -> Path:
    """Resolve a symbolic link, `.` and `..`."""
    return folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder


def _is_filled_in_place(target: Path) -> bool:
    """Whether a folder cannot be replaced by a rename: a mount point or the current directory."""
    return target.is_dir() and (target.is_mount() or target.samefile(os.curdir))


def _move_into(temporary: Path, target: Path, replace: bool, last: str) -> None:
    """Move the content of a temporary folder into a folder that cannot be renamed."""
    entries = sorted(temporary.iterdir(), key=lambda entry: entry.name == last)
    names = {entry.name for entry in entries}
    others = [path for path in target.iterdir() if path != temporary and path not in temporary.parents]
    if others and not replace:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
    for path in others:
        if path.name not in names or path.is_dir():
            remove(path)
    for entry in entries:
        entry.rename(target / entry.name)


def _exchange(temporary: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    remove(old)
    with suppress(FileNotFoundError):
        target.rename(old)
    temporary.rename(target)
    with suppress(OSError):  # the next one removes it
        remove(old)
