"""Separators: typed in a shell or a recipe, in files with either line end, or nowhere in a file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import SETTINGS, texts, write

from gemmule.data.documents import FileRange
from gemmule.data.plain_text import Separator, end_of_separator
from gemmule.data.readers import read_file_range, split_file
from gemmule.data.sources import read_source
from gemmule.data.streams import File
from messages import logged


def said(file: Path, separator: str = SETTINGS.separator) -> list[str]:
    with logged() as sentences:
        list(read_source(str(file), SETTINGS.replace(separator=separator), "train"))
    return sentences


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n\n", "\n\n"),
        (r"\n%\n", "\n%\n"),
        (r"a\tb\rc", "a\tb\rc"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        ("\n\r\n", "\n\n"),
        (r"\end{story}", r"\end{story}"),
        ("<|endoftext|>", "<|endoftext|>"),
        ("\\", "\\"),
    ],
)
def test_escapes_that_a_shell_leaves_are_understood(typed: str, meant: str) -> None:
    assert Separator.of(typed).text == meant


def test_line_ends_of_a_separator_match_those_of_windows(tmp_path: Path) -> None:
    paragraphs = SETTINGS.replace(separator="\n\n")
    unix = write(tmp_path / "unix.txt", "one\ntwo\n\nthree\n\nfour")
    windows = write(tmp_path / "windows.txt", "one\r\ntwo\r\n\r\nthree\r\n\r\nfour")
    assert texts(unix, paragraphs) == ["one\ntwo", "three", "four"]
    assert texts(windows, paragraphs) == ["one\r\ntwo", "three", "four"]
    assert texts(windows, SETTINGS.replace(separator="\r\n\r\n")) == ["one\r\ntwo", "three", "four"]
    assert texts(unix, SETTINGS.replace(separator=r"\n\n")) == ["one\ntwo", "three", "four"]


@given(
    parts=st.lists(st.sampled_from(["a", "b", "\n", "\r\n", "\r", "%", " "]), max_size=60).map("".join),
    separator=st.sampled_from(["\n\n", "\n%\n", "\n", "%\n", "\r\n\r\n"]),
    step=st.integers(1, 12),
)
def test_spans_are_the_documents_wherever_a_file_of_mixed_line_ends_is_cut(
    folders: Path, parts: str, separator: str, step: int
) -> None:
    settings = SETTINGS.replace(separator=separator)
    file = File(str(write(folders / "a.txt", parts + "x")))
    ranges = list(split_file(file, settings, step))
    whole = [FileRange(file, version=ranges[0].version)]
    apart, together = ([d for each in some for d in read_file_range(each, settings)] for some in (ranges, whole))
    assert apart == together
    as_cleaned = (parts + "x").replace("\r\n", "\n").split(separator.replace("\r\n", "\n"))
    assert [str(d.text).replace("\r\n", "\n") for d in together] == as_cleaned


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("separators")


def test_a_place_between_the_halves_of_a_line_end_is_not_taken(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a\r\n\r\nb\r\n\r\nc")
    with file.open("rb") as stream:
        places = [end_of_separator(stream, Separator.of("\n\n"), start) for start in range(12)]
    assert places == [5, 5] + [10] * 5 + [None] * 5


def test_a_separator_that_does_not_occur_is_said(tmp_path: Path) -> None:
    jokes = write(tmp_path / "jokes.txt", "one\n%\ntwo")
    [sentence] = said(jokes)
    assert sentence == f"the separator '<|end|>' does not occur in {jokes}: it is read as one document"
    assert said(jokes, r"\n%\n") == []
    assert said(jokes, r"\n*\n") == [f"the separator '\\n*\\n' does not occur in {jokes}: it is read as one document"]
    assert said(write(tmp_path / "one.txt", "one document<|end|>")) == []
    assert said(write(tmp_path / "rows.jsonl", '{"text": "one"}')) == []
    long = write(tmp_path / "long.txt", "line\n" * 300_000)
    assert said(long)[0].endswith("it is read as one document, split where it is longer than 1 MiB")


def test_a_separator_that_is_in_none_of_many_files_is_said_once(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.md", "one")
    write(tmp_path / "5.txt", "one<|end|>two")
    [sentence] = said(tmp_path)
    assert sentence.startswith("the separator '<|end|>' does not occur in 5 files (")
    assert "2.md, ...): each is read as one document" in sentence
