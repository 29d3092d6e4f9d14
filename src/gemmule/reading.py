"""Checks of paths before a file is opened: expansion, type, encoding, Git LFS pointers."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gemmule.errors import UserError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
IS_LFS_POINTER = "is a Git LFS pointer, not the file itself: run  git lfs pull  in its folder"


def local_path(name: str | Path) -> Path:
    """Return the local path of a name, with `~` expanded where no shell did; UserError for an empty name."""
    if not str(name).strip():
        raise UserError(f"{str(name)!r}: is no name of a file or folder; an unset shell variable leaves such a one")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no home directory
        return Path(name)


def path_kind(path: Path, error: Callable[[str], UserError] | None = None) -> Literal["file", "folder", "other"] | None:
    """Return the type of what a path leads to, None where it does not exist.

    Where it cannot be examined, raises `error` with a sentence, or returns None without `error`.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as cause:  # a closed folder, a loop of links, a name of 300 letters
        if error is None:
            return None
        raise error(f"{path}: cannot be read: {cause.strerror}") from None
    except ValueError:
        if error is None:
            return None
        raise error(f"{str(path)!r}: holds a null character, so it is no path") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def require_utf8(path: Path, error: Callable[[str], UserError]) -> None:
    """Raise `error` with a sentence where a path is not UTF-8, which the safetensors library cannot open."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise error(f"{path}: the path of a model or run must be UTF-8; rename it") from None


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether the first bytes of a file are those of a Git LFS pointer, left where the file was not fetched."""
    return beginning.startswith(_LFS_POINTER)
