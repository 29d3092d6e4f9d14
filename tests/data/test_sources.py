import gzip
import io
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from source_files import ROWS, SETTINGS, json_lines, texts, write, write_parquet

from gemmule.data import sources
from gemmule.data.documents import FileRange
from gemmule.data.plain_text import Separator, split_stream
from gemmule.data.readers import read_file_range, split_file
from gemmule.data.settings import DataSettings
from gemmule.data.sources import SOURCES, plan_units, read_range, read_source
from gemmule.data.streams import File
from gemmule.errors import MissingExtra, RecipeError, SourceError
from gemmule.settings import check_recipe


def test_text_is_split_at_the_separator(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "one\n<|end|>\ntwo<|end|>three<|end|>\n")) == ["one\n", "\ntwo", "three"]
    assert texts(write(tmp_path / "b.txt", "no separator")) == ["no separator"]


@given(
    parts=st.lists(st.text("ab\n\u00e9\u4f60 <|", max_size=30), min_size=1, max_size=6),
    separator=st.sampled_from(["<|>", "\n\n", "|"]),
    block=st.integers(1, 9),
)
def test_splitting_a_stream_equals_splitting_the_text(parts: list[str], separator: str, block: int) -> None:
    text = separator.join(parts)
    whole = text.encode().split(separator.encode())
    found = [piece.text for piece in split_stream(Slow(text.encode(), block), Separator.of(separator), 1000)]
    assert found == (whole if whole[-1].strip() else whole[:-1])


@given(
    text=st.lists(st.sampled_from(["a", "b", "\n", "<|>", "<|"]), max_size=100).map("".join),
    longest=st.integers(4, 20),
    block=st.integers(1, 40),
)
@example(text="aba<|>b", longest=4, block=1)  # a separator that begins within the limit and ends beyond it
def test_documents_do_not_depend_on_how_a_stream_is_read(text: str, longest: int, block: int) -> None:
    at_once, slowly = (
        list(split_stream(Slow(text.encode(), size), Separator.of("<|>"), longest)) for size in (1000, block)
    )
    assert at_once == slowly


@given(text=st.text("ab\n\u00e9\u4f60\U0001f984", max_size=200), longest=st.integers(4, 20), block=st.integers(1, 40))
@example(text="aaaa\n\n\n\n", longest=4, block=1)  # white space at the end, which cleaning strips, may be left out
def test_long_documents_are_cut_between_characters(text: str, longest: int, block: int) -> None:
    pieces = list(split_stream(Slow(text.encode(), block), Separator.of("<|>"), longest))
    if text.strip():
        together = b"".join(piece.text for piece in pieces)
        assert text.encode().startswith(together)
        assert not text.encode()[len(together) :].strip()
    for offset, piece, _ in pieces:
        assert len(piece) <= longest
        assert text.encode()[offset:].startswith(piece)
        piece.decode()


class Slow(io.BytesIO):
    """A stream that gives a few bytes at a time."""

    def __init__(self, content: bytes, block: int) -> None:
        super().__init__(content)
        self._block = block

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self._block)


def test_long_lines_are_cut_where_a_line_ends() -> None:
    pieces = [piece.text for piece in split_stream(io.BytesIO(b"one\ntwo\nthree four"), Separator.of("|"), 9)]
    assert pieces == [b"one\ntwo\n", b"three fou", b"r"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_are_read_compressed_or_not(ending: str, tmp_path: Path) -> None:
    content = json_lines(ROWS) + b"\n"
    if ending.endswith("gz"):
        content = gzip.compress(content)
    if ending.endswith("zst"):
        content = pytest.importorskip("zstandard").compress(content)
    assert texts(write(tmp_path / f"a{ending}", content)) == ROWS


def test_parquet_is_read_row_group_by_row_group(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [*ROWS, None])
    assert texts(file) == [*ROWS, ""]


def test_text_may_be_compressed_and_begin_with_a_mark(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt.gz", gzip.compress(b"\xef\xbb\xbfone<|end|>two"))
    assert texts(file) == ["one", "two"]


def test_a_column_can_be_chosen(tmp_path: Path) -> None:
    settings = SETTINGS.replace(column="story")
    assert texts(write(tmp_path / "a.jsonl", json_lines(ROWS, "story")), settings) == ROWS
    assert texts(write_parquet(tmp_path / "a.parquet", list(ROWS), "story"), settings) == ROWS


def test_folders_are_read_to_their_depths_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "b1<|end|>b2")
    write(tmp_path / "a" / "deep" / "c.jsonl", json_lines(["c"]))
    write(tmp_path / "a" / "d.txt", "d")
    write(tmp_path / "README.rst", "not a document")
    assert texts(tmp_path) == ["d", "c", "b1", "b2"]


def test_globs_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        write(tmp_path / name, name)
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    monkeypatch.chdir(tmp_path)
    assert texts("[ab].txt") == ["a.txt", "b.txt"]
    assert texts("**/a.txt") == ["a.txt"]


# Units.


@given(
    parts=st.lists(st.text("ab\n\u00e9 <|", max_size=30), min_size=1, max_size=12),
    separator=st.sampled_from(["<|>", "\n\n", "aa", "aba", "|"]),
    step=st.integers(1, 40),
    marked=st.booleans(),
)
def test_ranges_of_a_text_file_are_its_documents_wherever_it_is_cut(
    folders: Path, parts: list[str], separator: str, step: int, marked: bool
) -> None:
    settings = SETTINGS.replace(separator=separator)
    content = (b"\xef\xbb\xbf" if marked else b"") + separator.join(parts).encode()
    check_ranges(write(folders / "a.txt", content), settings, step)


@given(rows=st.lists(st.text("ab\n\u00e9\r", max_size=20), max_size=12), step=st.integers(1, 60))
def test_ranges_of_json_lines_are_its_documents_wherever_they_are_cut(
    folders: Path, rows: list[str], step: int
) -> None:
    check_ranges(write(folders / "a.jsonl", json_lines(rows)), SETTINGS, step)


@given(rows=st.lists(st.text("ab", max_size=20), max_size=12), step=st.integers(1, 60))
def test_ranges_of_parquet_are_its_documents_wherever_it_is_cut(
    folders: Path, rows: list[str | None], step: int
) -> None:
    check_ranges(write_parquet(folders / "a.parquet", rows), SETTINGS, step)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranges")


def check_ranges(file: Path, settings: DataSettings, step: int) -> None:
    """Check that a file's ranges, read apart, are the documents that reading it from end to end gives."""
    ranges = list(split_file(File(str(file)), settings, step))
    whole = [FileRange(File(str(file)), version=ranges[0].version)] if ranges else []
    apart, together = ([d for each in some for d in read_file_range(each, settings)] for some in (ranges, whole))
    assert apart == together


def test_a_file_is_cut_into_ranges_of_about_the_size_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "four<|end|>" * 1000)
    ranges = list(split_file(File(str(file)), SETTINGS, 1100))
    assert [each.size for each in ranges] == [1111] * 9 + [1001]
    assert [each.start for each in ranges] == [1111 * number for number in range(10)]


def test_documents_longer_than_the_limit_are_cut_alike_in_every_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_stream, "__defaults__", (10, None))
    check_ranges(write(tmp_path / "a.txt", "<|end|>".join(["line\n" * 7, "x" * 35, "", "short"] * 9)), SETTINGS, 20)
    assert max(len(text) for text in texts(tmp_path / "a.txt")) == 10


def test_units_join_small_files_and_divide_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT", 100)
    for number in range(10):
        write(tmp_path / "small" / f"{number}.txt", "x" * 40)
    large = write(tmp_path / "large.txt", "y" * 30 + ("<|end|>" + "y" * 30) * 19)
    settings = SETTINGS.replace(train=(str(tmp_path / "small"), str(large)), validation=str(large))
    units = plan_units(settings, "train")
    assert [len(unit.ranges) for unit in units if unit.source == 0] == [2] * 5
    assert [unit.name for unit in units] == [f"train-{number:05d}" for number in range(len(units))]
    assert len([unit for unit in units if unit.source == 1]) == 7
    assert [unit.ranges for unit in plan_units(settings, "validation")] == [u.ranges for u in units if u.source == 1]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one<|end|>two")
    (each,) = split_file(File(str(file)), SETTINGS, 100)
    write(file, "one<|end|>two<|end|>three")
    with pytest.raises(SourceError, match=r"a\.txt: has changed since the preparation started"):
        list(read_file_range(each, SETTINGS))


def test_a_wrong_line_is_counted_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json_lines(["a"] * 40) + b"{}\n" + json_lines(["b"] * 40))
    with pytest.raises(SourceError, match="line 41: no column 'text'"):
        [list(read_file_range(each, SETTINGS)) for each in split_file(File(str(file)), SETTINGS, 100)]


# What the user gets wrong.


def test_missing_empty_and_unknown_files_are_named(tmp_path: Path) -> None:
    for file, words in [
        (tmp_path / "nowhere.txt", r"nowhere\.txt: no such file"),
        (write(tmp_path / "empty.txt", ""), r"empty\.txt: the file is empty"),
        (write(tmp_path / "story.docx", "PK"), r"story\.docx: unsupported file format; use \.txt"),
        (tmp_path / "*.csv", r"\*\.csv: no file matches"),
        (tmp_path / "**x", r"\*\*x: "),
        (write(tmp_path / "folder" / "x.pdf", "a").parent, r"folder: the folder has no \.txt.*; not read: 1 \.pdf"),
    ]:
        with pytest.raises(SourceError, match=words):
            texts(file)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16"])
def test_utf16_is_recognised(encoding: str, tmp_path: Path) -> None:
    mark = "" if encoding == "utf-16" else "\ufeff"
    file = write(tmp_path / "a.txt", (mark + "one<|end|>two").encode(encoding))
    with pytest.raises(SourceError, match=r"a\.txt: not UTF-8 but UTF-16 .*iconv"):
        texts(file)


def test_a_file_in_another_encoding_is_refused_with_its_first_wrong_byte(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "plain<|end|>caf\u00e9<|end|>plain".encode("latin-1"))
    with pytest.raises(SourceError, match=r"a\.txt: not UTF-8: 1 of 3 documents, the first at byte 15; convert it"):
        texts(file)


def test_a_wrong_byte_at_the_very_beginning_is_the_first(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"2 of 2 documents, the first at byte 0;"):
        texts(write(tmp_path / "a.txt", b"\xe9<|end|>\xe9"))


def test_single_invalid_documents_are_handed_on_as_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", b"<|end|>".join([b"good"] * 150 + [b"b\xffd"] + [b"good"] * 50))
    assert texts(file) == [*["good"] * 150, b"b\xffd", *["good"] * 50]


def test_broken_json_lines_are_named(tmp_path: Path) -> None:
    good = json_lines(ROWS)
    for line, words in [
        (b'{"text": "cut', r"line 4 is not valid JSON"),
        (b'["a"]', r"line 4 is not a JSON object"),
        (b'{"body": "a", "id": 3}', r"line 4: no column 'text', which earlier rows have; it has 'body', 'id'"),
        (b'{"text": 5}', r"line 4: column 'text' holds int, not text"),
    ]:
        with pytest.raises(SourceError, match=words):
            texts(write(tmp_path / "a.jsonl", good + line + b"\n"))


def test_json_lines_that_are_not_utf8_are_handed_on_as_bytes(tmp_path: Path) -> None:
    found = texts(write(tmp_path / "a.jsonl", json_lines(["a"]) + b'{"text": "\xff"}\n'))
    assert found == ["a", b'{"text": "\xff"}\n']


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", list(ROWS))
    with pytest.raises(SourceError, match=r"no column 'story'; set data\.column .* to one of 'id', 'text'"):
        texts(file, SETTINGS.replace(column="story"))
    with pytest.raises(SourceError, match="column 'id' holds int, not text"):
        texts(file, SETTINGS.replace(column="id"))
    for content in (file.read_bytes()[:-20], b"no parquet at all"):
        with pytest.raises(SourceError, match=r"a\.parquet: not a readable Parquet file"):
            texts(write(file, content))


@pytest.mark.parametrize(
    ("library", "name", "content"),
    [("zstandard", "a.jsonl.zst", b"x"), ("pyarrow", "a.parquet", b"x"), ("datasets", "hf:owner/name", None)],
)
def test_missing_libraries_say_how_to_install_them(
    library: str, name: str, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    source = name if content is None else str(write(tmp_path / name, content))
    with pytest.raises(MissingExtra, match=rf"{library}, which is not installed: pip install 'gemmule\[sources\]'"):
        texts(source)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"holdout = 0\.0: must lie between 0 and 1"):
        check_recipe({"train": "a", "holdout": 0.0}, DataSettings, "here")
    with pytest.raises(RecipeError, match="separator"):
        check_recipe({"train": "a", "separator": ""}, DataSettings, "here")
    check_recipe({"train": "a", "validation": "b", "holdout": 0.0}, DataSettings, "here")


# The Hub, laid out on disk as it is there.

README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
---
"""
TALES = [f"tale {number}" for number in range(30)]


@pytest.fixture(params=["parquet", "jsonl"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with its shards, as roneneldan/TinyStories has them."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "roneneldan" / "TinyStories"
    write(repository / "README.md", README)
    shards = [("train", number, 4, TALES[number * 7 : number * 7 + 7]) for number in range(4)]
    for split, number, count, rows in [*shards, ("validation", 0, 1, ["held back"])]:
        file = repository / "data" / f"{split}-{number:05d}-of-{count:05d}-2d5a1467fff1081b.{request.param}"
        if request.param == "parquet":
            write_parquet(file, list(rows))
        else:
            write(file, json_lines(rows))
    monkeypatch.chdir(tmp_path)
    return repository


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("hub")
def test_the_hub_is_streamed_with_split_and_column() -> None:
    name = "hf:roneneldan/TinyStories"
    assert texts(name) == TALES[:28]
    assert texts(f"{name}:validation") == ["held back"]
    assert texts(f"{name}:validation:text") == ["held back"]
    assert [d.text for d in read_source(name, SETTINGS, "validation")] == ["held back"]
    with pytest.raises(SourceError, match=r"no column 'story'; set data\.column .* to one of 'id', 'text'"):
        texts(f"{name}:train:story")
    with pytest.raises(SourceError, match="TinyStories:test:text: cannot be read"):
        texts(f"{name}:test")


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("hub")
def test_each_shard_of_the_hub_is_a_unit_of_its_own() -> None:
    units = plan_units(SETTINGS.replace(train="hf:roneneldan/TinyStories"), "train")
    assert [[d.text for each in unit.ranges for d in read_range(each, SETTINGS)] for unit in units] == [
        TALES[first : first + 7] for first in range(0, 28, 7)
    ]


@pytest.fixture
def hub_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of the Hub that lie in a folder here, and are read as the Hub's are: opened, and from any place."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Files:
        def info(self, place: str) -> dict[str, object]:
            return {"size": (tmp_path / place).stat().st_size, "blob_id": "1a2b"}

        def open(self, place: str, mode: str) -> io.BufferedReader:
            assert mode == "rb"
            return (tmp_path / place).open("rb")

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    return tmp_path / "datasets"


def test_a_text_file_of_the_hub_is_read_in_units(hub_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT", 100)
    stories = [f"Once there was number {number}." for number in range(50)]
    write(hub_files / "roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt", "\n<|end|>\n".join(stories))
    source = "hf:roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt"
    assert [str(text).strip() for text in texts(source)] == stories
    units = plan_units(SETTINGS.replace(train=source), "train")
    assert len(units) > 10
    found = [str(d.text).strip() for unit in units for each in unit.ranges for d in read_range(each, SETTINGS)]
    assert found == stories


def test_other_files_of_the_hub_are_read_like_local_ones(hub_files: Path) -> None:
    write(hub_files / "owner/name/deep/a.jsonl.gz", gzip.compress(json_lines(ROWS)))
    write_parquet(hub_files / "owner/name/b.parquet", list(ROWS))
    assert texts("hf:owner/name/deep/a.jsonl.gz") == ROWS
    assert texts("hf:owner/name/b.parquet") == ROWS
    with pytest.raises(
        SourceError, match=r"hf:owner/name/c\.txt: cannot be read from the Hugging Face Hub \(FileNotFoundError: "
    ):
        texts("hf:owner/name/c.txt")
    with pytest.raises(SourceError, match=r"c\.pdf: unsupported file format"):
        texts("hf:owner/name/c.pdf")


class ConnectError(Exception):
    """What an HTTP client raises, which is no OSError."""


@pytest.mark.parametrize("broken", ["info", "open", "read"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_without_a_network_the_hub_is_a_sentence(
    broken: str, name: str, hub_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    whole = write_parquet(hub_files / "whole.parquet", list(ROWS)).read_bytes()
    contents = {"a.txt": b"one", "a.jsonl.gz": gzip.compress(json_lines(ROWS)), "a.parquet": whole}
    write(hub_files / "owner/name" / name, contents[name])

    def fail(*_: object) -> None:
        raise ConnectError("[Errno -2] Name or service not known\nand a second line")

    class Unreadable(io.BytesIO):
        read = readinto = fail  # type: ignore[assignment]

    instead = fail if broken != "read" else lambda *_: Unreadable(contents[name])
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "open" if broken == "read" else broken, instead)
    with pytest.raises(SourceError) as caught:
        texts(f"hf:owner/name/{name}")
    reason = (
        "(ConnectError: [Errno -2] Name or service not known); check the name and the network, or name a local copy"
    )
    assert str(caught.value) == f"hf:owner/name/{name}: cannot be read from the Hugging Face Hub {reason}"


@pytest.mark.parametrize("source", ["hf:", "hf:a/b:train:text:more"])
def test_misspelt_hub_sources_are_explained(source: str) -> None:
    with pytest.raises(SourceError, match=r"write it as hf:owner/name"):
        texts(source)


# Storybook.


def test_storybook_tells_as_many_stories_as_asked() -> None:
    told = list(read_source("storybook:5", SETTINGS, "train"))
    assert len(told) == 5
    assert all(isinstance(story.text, str) and (story.log_probability or 0) < 0 for story in told)
    assert list(read_source("storybook:2:3", SETTINGS, "train")) == told[3:]


def test_storybook_never_shares_stories_between_train_and_validation() -> None:
    train, validation = (set(texts_of(split)) for split in ("train", "validation"))
    assert len(train) == len(validation) == 200
    assert not train & validation


def texts_of(split: str) -> list[str | bytes]:
    return [document.text for document in read_source("storybook:200", SETTINGS, split)]  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["storybook:many", "storybook:0", "storybook:-1", "storybook:1:2:3"])
def test_misspelt_storybook_sources_are_explained(source: str) -> None:
    with pytest.raises(SourceError, match="write it as storybook"):
        texts(source)


def test_storybook_alone_means_a_default_count() -> None:
    assert isinstance(next(read_source("storybook", SETTINGS, "train")).text, str)


def test_a_file_may_have_the_name_of_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "storybook" / "a.txt", "one")
    assert texts("storybook") == ["one"]


def test_every_kind_of_source_is_tested_here() -> None:
    tasks = {"storybook-tasks", "text-tasks"}  # in test_tasks.py
    assert set(SOURCES) == {"hf", "storybook"} | tasks
