import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from gemmule.errors import OutputError
from gemmule.files import explained, folder_written_aside, held, written_aside

FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@contextmanager
def refusing_to_sync(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_file(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text)
        fail_if_asked(text)


def write_folder(path: Path, text: str) -> None:
    with folder_written_aside(path) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "file").write_text(text)
        fail_if_asked(text)
        (aside / "other").write_text(text)


def fail_if_asked(text: str) -> None:
    if text == "fail":
        raise ZeroDivisionError


def test_file_appears_whole_under_its_name(tmp_path: Path) -> None:
    write_file(tmp_path / "new" / "place" / "file", "one")
    write_file(tmp_path / "new" / "place" / "file", "two")
    assert contents(tmp_path) == {"new/place/file": "two"}


def test_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
        assert aside.parent == path.parent, "a rename is only atomic within a file system"
    assert path.read_text() == "new"


def test_failed_file_leaves_the_old_one_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_file(path, "fail")
    assert contents(tmp_path) == {"file": "old"}


def test_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "obsolete").write_text("old")
    write_folder(tmp_path / "run", "new")
    assert contents(tmp_path) == {"run/deep/file": "new", "run/other": "new"}


def test_failed_folder_leaves_the_old_one_and_no_rubbish(tmp_path: Path) -> None:
    write_folder(tmp_path / "run", "old")
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "run", "fail")
    assert contents(tmp_path) == {"run/deep/file": "old", "run/other": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_rubbish_of_a_killed_run_is_swept_away(tmp_path: Path) -> None:
    for name in (".run.partial", ".run.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rubbish").write_text("half")
    write_folder(tmp_path / "run", "one")
    write_folder(tmp_path / "run", "two")
    assert contents(tmp_path) == {"run/deep/file": "two", "run/other": "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_everything_is_synced_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None]
) -> None:
    synced: list[tuple[int, bool]] = []
    sync = os.fsync

    def note(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, (tmp_path / "it").exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "it", "text")
    assert synced.pop() == (tmp_path.stat().st_ino, True), "the folder that holds the name is synced last"
    written = [tmp_path / "it", *(tmp_path / "it").rglob("*")]
    assert sorted(synced) == sorted((path.stat().st_ino, False) for path in written)


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_full_device_is_explained_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None]
) -> None:
    write(tmp_path / "it", "old")
    before = contents(tmp_path)
    with (
        refusing_to_sync(monkeypatch, errno.ENOSPC),
        pytest.raises(OutputError, match=r"/it: no space left on the device; free some"),
    ):
        write(tmp_path / "it", "new")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_place_below_a_file_is_explained(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file/it: cannot be written"):
        write(tmp_path / "file" / "it", "text")


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_name_that_is_too_long_is_explained(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        write(tmp_path / ("n" * 250), "text")


def test_refusal_names_its_reason(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"it: cannot be written: Permission denied"), explained(tmp_path / "it"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@needs_full_device
def test_full_device_is_recognised_while_writing(tmp_path: Path) -> None:
    (tmp_path / ".it.partial").symlink_to(FULL)
    with pytest.raises(OutputError, match="no space left on the device"):
        write_file(tmp_path / "it", "text")
    assert list(tmp_path.iterdir()) == []


def test_full_device_is_recognised_in_the_tensor_library(tmp_path: Path) -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OutputError, match="no space left on the device"), explained(tmp_path):
        raise SafetensorError(message)


def test_other_failures_of_the_tensor_library_pass(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="nonsense"), explained(tmp_path):
        raise SafetensorError("nonsense")


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path):
        with pytest.raises(OutputError, match="another process is writing there"), held(tmp_path):
            pass
        with pytest.raises(OutputError, match="another process"), held(tmp_path):
            pass  # being refused does not free it
    with held(tmp_path):
        pass


def test_two_writers_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    with folder_written_aside(tmp_path / "folder") as aside:
        (aside / "file").write_text("first")
        with pytest.raises(OutputError, match="another process is writing there"):
            write_folder(tmp_path / "folder", "second")
    assert contents(tmp_path) == {"folder/file": "first"}


@needs_full_device
def test_full_device_is_recognised_when_numpy_writes_less_than_it_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="no space left on the device"),
        explained(tmp_path),
        FULL.open("wb") as file,
    ):
        np.save(file, np.zeros(50_000))
