"""Whatever the operating system answers while data is prepared: what is finished is kept, and the command goes on."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemmule.cli.main import build_app
from runs import gemmule, write_text

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS, errno.EFBIG)
CALLS = ("open", "write", "fsync", "rename", "mkdir", "remove", "rmdir")


class Disk:
    """Counts what the operating system is asked for below a folder, and fails at one call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.target, self.error = folder, dict.fromkeys(CALLS, 0), ("", 0), 0
        self.finished: set[str] = set()  # at the time of the failure

    def __call__(self, call: str, path: object) -> None:
        if not str(path).startswith(str(self.folder)):
            return
        self.calls[call] += 1
        if (call, self.calls[call]) == self.target:
            self.finished = finished(self.folder)
            raise OSError(self.error, os.strerror(self.error), str(path))


class Written:
    """An open file, each write to which is counted."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, content: Any) -> Any:
        self._disk("write", self._file.name)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Written":
        self._file.__enter__()
        return self

    def __exit__(self, *ended: Any) -> Any:
        return self._file.__exit__(*ended)


DISKS: list[Disk] = []  # the one that is watched; an audit hook cannot be taken away again


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not DISKS:
        return
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        DISKS[0]("open", arguments[0])
    elif event == "os.rename":
        DISKS[0]("rename", arguments[0])
    elif event in ("os.mkdir", "os.remove", "os.rmdir"):
        DISKS[0](event[3:], arguments[0])


sys.addaudithook(watch)


@contextmanager
def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(folder)
    real_open = io.open

    def open_watched(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        opened = real_open(file, mode, *more, **options)
        return Written(opened, disk) if set(mode) & set("wax+") else opened

    def fsync_watched(handle: int) -> None:
        disk("fsync", Path(f"/proc/self/fd/{handle}").readlink())  # and not the disk itself, which takes time

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", open_watched)
        patch.setattr("builtins.open", open_watched)
        patch.setattr(os, "fsync", fsync_watched)
        patch.setitem(sys.modules, "matplotlib.figure", None)  # draws through files of its own
        DISKS.append(disk)
        try:
            yield disk
        finally:
            DISKS.clear()


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """Return what prepares a small corpus by the command."""
    folder = tmp_path_factory.mktemp("text")
    train, valid = write_text(folder / "train.txt", 300), write_text(folder / "valid.txt", 20, seed=1)
    build_app()
    return lambda out: gemmule(
        "prepare", train, "--validation", valid, "--vocab-size", 300, "--out", out, "--workers", 1
    )


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
@pytest.mark.parametrize("share", [pytest.param(0.02, id="some"), pytest.param(1.0, id="all", marks=pytest.mark.slow)])
def test_any_error_of_the_system_loses_nothing_that_is_finished(
    share: float, prepare: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(tmp_path, monkeypatch) as disk:
        assert prepare(tmp_path / "expected").code == 0
    expected, counts = content(tmp_path / "expected"), disk.calls
    assert min(counts.values()) > 0, counts
    steps = dict.fromkeys(CALLS, 1) | {"write": 9}  # most are of one document after the other
    places = [(call, place) for call in CALLS for place in range(1, counts[call] + 1, steps[call])]
    cases = [(*place, ERRORS[number % len(ERRORS)]) for number, place in enumerate(places)]
    assert len(cases) > 100
    for call, place, error in cases[:: round(1 / share)]:
        case = f"{errno.errorcode[error]} in {call} {place}"
        (tmp_path / f"{call}-{place}").mkdir()
        out = tmp_path / f"{call}-{place}" / "out"
        with watched(out.parent, monkeypatch) as disk:
            disk.target, disk.error = (call, place), error
            ended = prepare(out)
        if ended.code == 0:  # a folder is there already, or what is no longer needed stays
            assert call in ("mkdir", "remove", "rmdir"), case
        else:
            assert ended.code == 2, f"{case}: {ended.err}"
            last = ended.err.strip().splitlines()[-1]
            assert str(tmp_path) in last, f"{case}: {last}"
            assert out.name in last, f"{case}: {last}"
            assert any(words in last for words in (os.strerror(error), *REASONS[error])), f"{case}: {last}"
            assert disk.finished <= finished(out.parent) or (out / "dataset.json").exists(), case
            if disk.finished:
                kept = "finished work is kept in", "is complete"
                assert any(words in ended.err for words in kept), case
        if not (out / "dataset.json").exists():
            with watched(out.parent, monkeypatch):
                again = prepare(out)
            assert again.code == 0, f"{case}: {again.err}"
        assert content(out) == expected, case


REASONS: dict[int, tuple[str, ...]] = dict.fromkeys(ERRORS, ()) | {
    errno.ENOSPC: ("no space left on the device",),
    errno.EDQUOT: ("the disk quota is exceeded",),
    errno.EFBIG: ("ulimit -f",),
}


def finished(folder: Path) -> set[str]:
    """Return what is finished below a folder: the notes of units."""
    return {str(note) for note in folder.glob(".*.partial/**/*.json") if ".partial" not in note.name}
