"""Which files a SOURCE stands for, and that what is not read is said."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from source_files import SETTINGS, texts, write

from gemmule.data import discovery
from gemmule.data.discovery import Skipped, find_files
from gemmule.data.settings import DataSettings
from gemmule.data.sources import StorybookSource, parse_source, plan_units
from gemmule.errors import SourceError
from messages import logged


def found(source: Path | str) -> tuple[list[str], list[str]]:
    skipped = Skipped()
    files = find_files(str(source), skipped)
    sentence = skipped.clause(f"{source}: ")
    return [file.name for file in files], [sentence] if sentence else []


def test_files_of_a_folder_that_are_not_read_are_named_in_one_line(tmp_path: Path) -> None:
    for name in ("a.txt", "B.TXT", "c.md", "d.pdf", "e.pdf", "Makefile", ".hidden.txt", ".git/config", "deep/._f.txt"):
        write(tmp_path / name, "x")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    files, [sentence] = found(tmp_path)
    assert files == ["B.TXT", "a.txt", "c.md"]
    assert sentence == (
        f"{tmp_path}: not read: 1 without a suffix, 2 .pdf, 3 hidden, 1 not a regular file, "
        f"broken links: {tmp_path / 'gone.txt'}"
    )
    with logged() as said:
        units = plan_units(DataSettings(train=str(tmp_path), validation=str(tmp_path)), "train")
    assert len(units) == 1
    assert said == [sentence]


def test_nothing_is_said_where_all_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    assert found(tmp_path)[1] == found(tmp_path / "*.txt")[1] == found(tmp_path / "a.txt")[1] == []


def test_links_to_folders_are_followed_each_once(tmp_path: Path) -> None:
    write(tmp_path / "real" / "b.txt", "b")
    write(tmp_path / "other" / "c.txt", "c")
    source = tmp_path / "source"
    write(source / "deep" / "a.txt", "a")
    (source / "again").symlink_to("deep")
    (source / "more").symlink_to("../real")
    (source / "deep" / "up").symlink_to("..")
    (tmp_path / "real" / "on").symlink_to("../other")
    (tmp_path / "other" / "back").symlink_to("../real")
    assert [str(file.relative_to(source)) for file in find_files(str(source))] == [
        "deep/a.txt",
        "more/b.txt",
        "more/on/c.txt",
    ]
    assert texts(source) == ["a", "b", "c"]


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that only another user may look into."""
    folder = tmp_path / "source" / "closed"
    write(folder / "a.txt", "secret")
    scandir, stat = os.scandir, Path.stat

    def refuse(path: Any) -> None:
        if Path(path) == folder or folder in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))

    def scan(path: Any = ".") -> Iterator[os.DirEntry[str]]:
        refuse(path)
        return scandir(path)

    def look(path: Path, **options: Any) -> os.stat_result:
        if folder in path.parents:
            refuse(path)
        return stat(path, **options)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(Path, "stat", look)
    return folder


def test_folders_that_cannot_be_opened_are_named(closed: Path) -> None:
    write(closed.parent / "a.txt", "x")
    files, [sentence] = found(closed.parent)
    assert files == ["a.txt"]
    assert sentence == f"{closed.parent}: not read: cannot be opened: {closed} (Permission denied)"
    for source in (closed, closed / "a.txt", closed / "b.txt"):
        with pytest.raises(SourceError, match=rf"{source}: cannot be read \(Permission denied\)"):
            find_files(str(source))


def test_names_that_no_file_can_have_are_refused() -> None:
    for name in ("x" * 300, "a\0b", "x" * 300 + "*"):
        with pytest.raises(SourceError):
            find_files(name)


def test_without_a_home_a_tilde_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(SourceError, match=r"~/a\.txt: no such file"):
        find_files("~/a.txt")


def test_globs_pass_over_what_a_shell_does_and_say_so(tmp_path: Path) -> None:
    for name in ("a.txt", "._a.txt", "b/c.txt"):
        write(tmp_path / name, "x")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    files, [sentence] = found(f"{tmp_path}/*")
    assert files == ["a.txt"]
    assert "1 hidden" in sentence
    assert f"broken links: {tmp_path}/gone.txt" in sentence
    assert f"folders that match: {tmp_path}/b" in sentence
    assert found(f"{tmp_path}/._*")[0] == ["._a.txt"]


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    for number in range(9):
        (tmp_path / f"{number}.txt").symlink_to("nowhere")
    assert found(tmp_path)[1][0].endswith("4.txt and 4 more")


# What is here is read, whatever its name looks like.


@pytest.mark.parametrize(
    "name",
    ["datasets/a.txt", "datasets/owner/name/a.txt", "storybook/a.txt", "hf/a.txt", "hf:x.txt", "hf:owner/name/a.txt"],
)
def test_a_file_here_is_read_whatever_it_is_called(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemmule.data.streams.hub_files", lambda: pytest.fail("the Hub was asked"))
    write(tmp_path / name, "one<|end|>two")
    for source in (name, f"./{name}", name.partition("/")[0], f"./{name[:-5]}*.txt"):
        assert texts(source) == ["one", "two"], source


def test_a_name_that_means_two_things_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "storybook" / "a.txt", "one")
    with logged() as said:
        plan_units(SETTINGS.replace(train="storybook"), "train")
    assert said == ["storybook: the local path of this name is read"]
    assert parse_source("storybook:5") == StorybookSource(5)


def test_hub_names_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "hf:a.txt", "one")
    with pytest.raises(SourceError, match=r"hf:\*\.txt: write it as .*; a local file of this name is \./hf:\*\.txt"):
        texts("hf:*.txt")
    assert texts("./hf:*.txt") == ["one"]


def test_prepared_folders_are_no_text(tmp_path: Path) -> None:
    write(tmp_path / "made" / "dataset.json", "{}")
    with pytest.raises(SourceError, match=r"made: is a prepared dataset, not text; train on it alone, by data\.train"):
        find_files(str(tmp_path / "made"))


def test_known_formats_are_named_in_one_place() -> None:
    assert discovery.known_formats() == (
        ".txt, .md, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, also compressed as .gz or .zst"
    )
