"""File discovery: the files of a path, folder or glob, and those that are skipped."""

import errno
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from gemmule.data.dataset import DATASET_FILE
from gemmule.data.readers import FORMATS
from gemmule.data.streams import COMPRESSIONS, File, file_version
from gemmule.errors import SourceError
from gemmule.reading import local_path, path_kind

_NAMED = 5  # files of a kind that a message names


def find_files(source: str, skipped: "Skipped | None" = None) -> list[Path]:
    """Return the files of a local source, sorted; folders are searched recursively, links followed, each folder once.

    Files that are not read are counted in `skipped`. Raises SourceError where there is nothing to read.
    """
    path, skipped = local_path(source), skipped or Skipped()
    if path_kind(path) == "folder":
        if path_kind(path / DATASET_FILE):
            advice = "train on it alone, by data.train; it has its own validation split"
            raise SourceError(f"{source}: is a prepared dataset, not text; {advice}")
        files = sorted(_walk(path, skipped))
        if not files:
            raise SourceError(f"{source}: the folder has no {known_formats()}{skipped.clause('; ')}")
    elif path_kind(path) or not set(source) & set("*?["):
        _check_there(path)
        check_format(File(str(path)))
        return [path]
    else:
        files = sorted(_matching(path, skipped))
        if not files:
            raise SourceError(f"{source}: no file matches{skipped.clause('; ')}")
        for file in files:
            check_format(File(str(file)))
    return files


def check_format(file: File) -> None:
    """Raise SourceError where a file is empty or of an unsupported format."""
    if file.suffix not in FORMATS:
        raise SourceError(f"{file}: unsupported file format; use {known_formats()}")
    if not file_version(file).size:
        raise SourceError(f"{file}: the file is empty")


def known_formats() -> str:
    """Name the supported file formats."""
    return f"{', '.join(FORMATS)}, also compressed as {' or '.join(COMPRESSIONS)}"


def _check_there(path: Path) -> None:
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            advice = "a SOURCE may also be a glob, hf:owner/name, storybook, or - for standard input"
            raise SourceError(f"{path}: no such file or folder; {advice}") from None
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a null character in it
        raise SourceError(f"{str(path)!r}: no file can have this name ({error})") from None


class Skipped:
    """The files of a folder or a glob that are not read."""

    def __init__(self) -> None:
        self.suffixes: Counter[str] = Counter()
        self.hidden = 0
        self.special = 0
        self.links: list[str] = []
        self.closed: list[str] = []
        self.folders: list[str] = []

    def clause(self, before: str) -> str:
        """Summarize them in one clause after `before`; empty where all files are read."""
        parts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(self.suffixes.items())]
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden")
        if self.special:
            parts.append(f"{self.special:,} {'not a regular file' if self.special == 1 else 'not regular files'}")
        for kind, names in (
            ("broken links", self.links), ("folders that match", self.folders), ("cannot be opened", self.closed),
        ):  # fmt: skip
            if names:
                more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
                parts.append(f"{kind}: {', '.join(sorted(names)[:_NAMED])}{more}")
        return f"{before}not read: {', '.join(parts)}" if parts else ""


def _walk(top: Path, skipped: Skipped) -> Iterator[Path]:
    """Yield the supported files below a folder: first those of real folders, then those behind links."""
    seen: set[tuple[int, int]] = set()
    linked: deque[Path] = deque([top])
    while linked:
        folders = [linked.popleft()]
        while folders:
            folder = folders.pop()
            try:
                status = folder.stat()
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                if folder == top:
                    raise SourceError(f"{top}: cannot be read ({error.strerror})") from None
                skipped.closed.append(f"{folder} ({error.strerror})")
                continue
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith("."):
                    skipped.hidden += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_symlink() and path_kind(path) == "folder":
                    linked.append(path)
                elif _is_supported(path, skipped):
                    yield path


def _is_supported(path: Path, skipped: Skipped) -> bool:
    """Whether a file of a folder is supported; counts it as skipped where not."""
    suffix = File(str(path)).suffix
    try:
        mode = path.stat().st_mode
    except OSError as error:
        broken = error.errno in (errno.ENOENT, errno.ELOOP)
        (skipped.links if broken else skipped.closed).append(str(path))
        return False
    if suffix not in FORMATS:
        skipped.suffixes[suffix] += 1
        return False
    skipped.special += not stat.S_ISREG(mode)
    return stat.S_ISREG(mode)


def _matching(pattern: Path, skipped: Skipped) -> Iterator[Path]:
    """Yield the files that match a glob; as in a shell, hidden ones only where the pattern names the dot."""
    dots = any(part.startswith(".") and part != ".." for part in pattern.parts)
    top, parts = Path(pattern.anchor), pattern.relative_to(pattern.anchor).parts
    try:
        for path in top.glob(str(Path(*parts))):
            kind = path_kind(path)
            if not dots and any(part.startswith(".") and part != ".." for part in path.parts):
                skipped.hidden += 1
            elif kind == "file":
                yield path
            elif kind == "folder":
                skipped.folders.append(str(path))
            elif kind:
                skipped.special += 1
            else:
                skipped.links.append(str(path))
        for length in range(1, len(parts)):
            folders = (path for path in top.glob(str(Path(*parts[:length]))) if path.is_dir())
            skipped.closed += [str(folder) for folder in folders if not os.access(folder, os.R_OK | os.X_OK)]
    except (ValueError, OSError) as error:
        raise SourceError(f"{pattern}: {error}") from None
