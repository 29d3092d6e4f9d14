import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from gemmule.errors import OutputError
from gemmule.files import as_output_error, atomic_folder, atomic_write, directory_lock, partial_folder

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
    with atomic_write(path) as aside:
        aside.write_text(text)
        fail_if_asked(text)


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path, replace=True) as aside:
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
    with atomic_write(path) as aside:
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
    with (
        pytest.raises(OutputError, match=r"it: cannot be written: Permission denied"),
        as_output_error(tmp_path / "it"),
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@needs_full_device
def test_full_device_is_recognised_while_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="no space left on the device"),
        atomic_write(tmp_path / "it"),
        FULL.open("w") as file,
    ):
        file.write("text")
    assert list(tmp_path.iterdir()) == []


def test_full_device_is_recognised_in_the_tensor_library(tmp_path: Path) -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OutputError, match="no space left on the device"), as_output_error(tmp_path):
        raise SafetensorError(message)


def test_other_failures_of_the_tensor_library_pass(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="nonsense"), as_output_error(tmp_path):
        raise SafetensorError("nonsense")


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with directory_lock(tmp_path):
        with pytest.raises(OutputError, match="another process is writing there"), directory_lock(tmp_path):
            pass
        with pytest.raises(OutputError, match="another process"), directory_lock(tmp_path):
            pass  # being refused does not free it
    with directory_lock(tmp_path):
        pass


def test_two_writers_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "folder") as aside:
        (aside / "file").write_text("first")
        with pytest.raises(OutputError, match="another process is writing there"):
            write_folder(tmp_path / "folder", "second")
    assert contents(tmp_path) == {"folder/file": "first"}


@needs_full_device
def test_full_device_is_recognised_when_numpy_writes_less_than_it_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="no space left on the device"),
        as_output_error(tmp_path),
        FULL.open("wb") as file,
    ):
        np.save(file, np.zeros(50_000))


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EDQUOT, "it: cannot be written: the disk quota is exceeded"),
        (errno.EFBIG, "it: cannot be written: larger than the file system"),
        (errno.EIO, "it: cannot be written: Input/output error"),
        (errno.EROFS, "it: cannot be written: Read-only file system"),
    ],
)
def test_every_error_of_the_system_is_explained(tmp_path: Path, number: int, sentence: str) -> None:
    with pytest.raises(OutputError, match=sentence), as_output_error(tmp_path / "it"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(OutputError, match=sentence), as_output_error(tmp_path / "it"):
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")


def test_an_error_of_another_file_names_that_one(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^/elsewhere/source\.txt: cannot be"), as_output_error(tmp_path / "it"):
        Path("/elsewhere/source.txt").read_text()


def test_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    """A group folder, in which others may write."""
    thesis, letter = tmp_path / "thesis", tmp_path / "letter.txt"
    thesis.mkdir()
    (thesis / "chapter").write_text("years of work")
    letter.write_text("dear")
    (tmp_path / ".it.partial").symlink_to(letter)
    write_file(tmp_path / "it", "text")
    (tmp_path / ".folder.partial").symlink_to(thesis)
    with pytest.raises(OutputError, match=r"\.folder\.partial: is no folder, where a temporary folder is needed"):
        write_folder(tmp_path / "folder", "text")
    assert contents(tmp_path) == {"it": "text", "letter.txt": "dear", "thesis/chapter": "years of work"}


def test_another_users_temporary_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".folder.partial").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(OutputError, match="another user's folder"):
        write_folder(tmp_path / "folder", "text")


def test_file_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".it.partial").write_text("half of a longer text")
    write_file(tmp_path / "it", "new")
    assert contents(tmp_path) == {"it": "new"}


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "it") as aside:
        aside.write_text("first")
        with pytest.raises(OutputError, match="another process is writing there"):
            write_file(tmp_path / "it", "second")
    assert contents(tmp_path) == {"it": "first"}


def test_what_came_meanwhile_is_kept_beside_what_was_written(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with atomic_folder(folder) as aside:
            (aside / "file").write_text("new")
            folder.mkdir()
            (folder / "notes").write_text("weeks of work")

    with pytest.raises(OutputError, match=r"folder: another program wrote into it .* kept in .*\.folder\.partial"):
        write(tmp_path / "folder")
    assert contents(tmp_path) == {".folder.partial/file": "new", "folder/notes": "weeks of work"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with atomic_folder(tmp_path / "folder") as aside:
        (aside / "file").write_text("new")
    assert contents(tmp_path) == {"folder/file": "new"}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk")
    write_folder(tmp_path / "model", "one")
    write_folder(tmp_path / "model", "two")
    assert (tmp_path / "model").is_symlink()
    assert contents(tmp_path / "disk") == {"deep/file": "two", "other": "two"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "model"]


def test_a_link_in_the_place_of_an_old_folder_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".folder.old").symlink_to(tmp_path)
    write_folder(tmp_path / "folder", "one")
    write_folder(tmp_path / "folder", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("place", ["mount point", "current directory"])
def test_what_cannot_be_renamed_is_filled_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if folder in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    if place == "mount point":
        monkeypatch.setattr(os, "rename", refuse)
        monkeypatch.setattr(Path, "is_mount", lambda path: path == folder)
    else:
        monkeypatch.chdir(folder)
        folder = Path()
    order: list[str] = []
    with atomic_folder(folder, last="config.json") as aside:
        assert aside == partial_folder(folder)
        assert aside.parent.samefile(folder)
        for name in ("config.json", "model", "tokenizer.json"):
            (aside / name).write_text("text")
        monkeypatch.setattr(Path, "rename", lambda path, target: (order.append(path.name), path.replace(target)))
    assert order == ["model", "tokenizer.json", "config.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(order)
    with pytest.raises(OutputError, match="another program wrote into it"), atomic_folder(folder) as aside:
        (aside / "other").write_text("text")
    assert (aside / "other").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_file_systems_without_sync_of_folders_are_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None], number: int
) -> None:
    with refusing_to_sync(monkeypatch, number):
        write(tmp_path / "it", "text")
    assert (tmp_path / "it").exists()
