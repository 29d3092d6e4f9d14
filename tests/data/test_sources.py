import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemmule.data.readers import split_stream
from gemmule.data.settings import DataSettings
from gemmule.data.sources import SOURCES, read_source, text_size
from gemmule.errors import MissingExtra, RecipeError, SourceError
from gemmule.recipe import check_recipe

SETTINGS = DataSettings(train="unused", separator="<|end|>")
ROWS = ["first story", "", "third\nstory with caf\u00e9"]


def texts(source: Path | str, settings: DataSettings = SETTINGS) -> list[str | bytes]:
    return [document.text for document in read_source(str(source), settings, "train")]


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def json_lines(rows: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, column: row}) + "\n" for n, row in enumerate(rows)).encode()


def write_parquet(file: Path, rows: list[str | None], column: str = "text") -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"id": list(range(len(rows))), column: rows}), file, row_group_size=2)
    return file


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
    found = [document for _, document in split_stream(Slow(text.encode(), block), separator.encode(), 1000)]
    assert found == (whole if whole[-1].strip() else whole[:-1])


@given(
    text=st.lists(st.sampled_from(["a", "b", "\n", "<|>", "<|"]), max_size=100).map("".join),
    longest=st.integers(4, 20),
    block=st.integers(1, 40),
)
@example(text="aba<|>b", longest=4, block=1)  # a separator that begins within the limit and ends beyond it
def test_documents_do_not_depend_on_how_a_stream_is_read(text: str, longest: int, block: int) -> None:
    at_once, slowly = (list(split_stream(Slow(text.encode(), size), b"<|>", longest)) for size in (1000, block))
    assert at_once == slowly


@given(text=st.text("ab\n\u00e9\u4f60\U0001f984", max_size=200), longest=st.integers(4, 20), block=st.integers(1, 40))
def test_long_documents_are_cut_between_characters(text: str, longest: int, block: int) -> None:
    pieces = list(split_stream(Slow(text.encode(), block), b"<|>", longest))
    if text.strip():
        assert b"".join(piece for _, piece in pieces) == text.encode()
    for offset, piece in pieces:
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
    pieces = [piece for _, piece in split_stream(io.BytesIO(b"one\ntwo\nthree four"), b"|", 9)]
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
    write(tmp_path / "README.md", "not a document")
    assert texts(tmp_path) == ["d", "c", "b1", "b2"]


def test_globs_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        write(tmp_path / name, name)
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    monkeypatch.chdir(tmp_path)
    assert texts("[ab].txt") == ["a.txt", "b.txt"]
    assert texts("**/a.txt") == ["a.txt"]


def test_text_size_is_known_for_plain_text_alone(tmp_path: Path) -> None:
    assert text_size(str(write(tmp_path / "a.txt", "12345"))) == 5
    assert text_size(str(write(tmp_path / "a.jsonl", json_lines(ROWS)))) is None
    assert text_size("storybook:10") is None


# What the user gets wrong.


def test_missing_empty_and_unknown_files_are_named(tmp_path: Path) -> None:
    for file, words in [
        (tmp_path / "nowhere.txt", r"nowhere\.txt: no such file"),
        (write(tmp_path / "empty.txt", ""), r"empty\.txt: the file is empty"),
        (write(tmp_path / "story.docx", "PK"), r"story\.docx: not a kind of file that is read; use \.txt"),
        (tmp_path / "*.csv", r"\*\.csv: no file matches"),
        (tmp_path / "**x", r"\*\*x: "),
        (write(tmp_path / "folder" / "x.csv", "a").parent, r"folder: this folder holds no \.txt"),
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
        (b'{"body": "a", "id": 3}', r"line 4: no column 'text'; set data\.column to one of 'body', 'id'"),
        (b'{"text": 5}', r"line 4: column 'text' holds int, not text"),
    ]:
        with pytest.raises(SourceError, match=words):
            texts(write(tmp_path / "a.jsonl", good + line + b"\n"))


def test_json_lines_that_are_not_utf8_are_handed_on_as_bytes(tmp_path: Path) -> None:
    found = texts(write(tmp_path / "a.jsonl", json_lines(["a"]) + b'{"text": "\xff"}\n'))
    assert found == ["a", b'{"text": "\xff"}\n']


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", list(ROWS))
    with pytest.raises(SourceError, match=r"no column 'story'; set data\.column to one of 'id', 'text'"):
        texts(file, SETTINGS.replace(column="story"))
    with pytest.raises(SourceError, match="column 'id' holds int, not text"):
        texts(file, SETTINGS.replace(column="id"))
    for content in (file.read_bytes()[:-20], b"no parquet at all"):
        with pytest.raises(SourceError, match=r"a\.parquet: not a readable Parquet file"):
            texts(write(file, content))


def test_damaged_compression_is_named(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = gzip.compress(json_lines(ROWS * 100))
    frame = zstandard.compress(json_lines(ROWS * 100))
    for name, content in [
        ("a.jsonl.gz", packed[: len(packed) // 2]),
        ("b.jsonl.gz", b"junk" + packed),
        ("c.jsonl.gz", packed[:20] + b"zzzz" + packed[24:]),
        ("d.jsonl.zst", b"junk" + frame),
    ]:
        with pytest.raises(SourceError, match=name.replace(".", r"\.") + ": cannot be read"):
            texts(write(tmp_path / name, content))


def test_a_truncated_zstd_file_is_noticed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = "".join(f"{number * number}\n" for number in range(50_000)).encode()
    frame = zstandard.compress(content)
    assert len(texts(write(tmp_path / "a.txt.zst", frame))) == 1
    with pytest.raises(SourceError, match=rf"a\.txt\.zst: truncated: \d+ bytes of text, expected {len(content)}"):
        texts(write(tmp_path / "a.txt.zst", frame[: len(frame) // 2]))


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split, rows in (("train", ROWS), ("validation", ["held back"])):
        write_parquet(tmp_path / "owner" / "stories" / "data" / f"{split}-00000-of-00001.parquet", list(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("hub")
def test_the_hub_is_streamed_with_split_and_column() -> None:
    assert texts("hf:owner/stories") == ROWS
    assert texts("hf:owner/stories:validation") == ["held back"]
    assert texts("hf:owner/stories:validation:text") == ["held back"]
    assert [d.text for d in read_source("hf:owner/stories", SETTINGS, "validation")] == ["held back"]
    with pytest.raises(SourceError, match=r"no column 'story'; set data\.column to one of 'id', 'text'"):
        texts("hf:owner/stories:train:story")
    with pytest.raises(SourceError, match="hf:owner/stories:test: cannot be read"):
        texts("hf:owner/stories:test")


def test_one_file_of_a_hub_repository_is_read_like_a_local_one(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str, str]] = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(write(hub / "blob.txt", "one<|end|>two"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert texts("hf:owner/stories/texts/train.txt") == ["one", "two"]
    assert asked == [("owner/stories", "texts/train.txt", "dataset")]


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
    assert set(SOURCES) == {"hf", "storybook"}
