"""Where compiled code is kept, so that nobody else can put a library there."""

import os
import stat
from pathlib import Path

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path | None:
    """Return the user's private cache folder for compiled code; None where it cannot be made."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if not base.is_absolute():  # such a value is to be ignored, says the XDG specification
            base = Path.home() / ".cache"
        folder = base / "gemmule"
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return None
        if status.st_mode & WRITABLE_BY_OTHERS:
            folder.chmod(0o700)
    except (OSError, RuntimeError):  # no home, a disk that is read-only or full
        return None
    return folder
