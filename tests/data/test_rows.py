"""JSON Lines, JSON, CSV, TSV and Parquet: where the text of a row is, and what cannot be read."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import ROWS, SETTINGS, json_lines, texts, write, write_parquet

from gemmule.data import rows
from gemmule.data.rows import _JsonText
from gemmule.data.sources import read_source
from gemmule.data.streams import File
from gemmule.errors import SourceError
from messages import logged


def refuse(file: Path, words: str, column: str = "text") -> None:
    with pytest.raises(SourceError, match=words):
        texts(file, SETTINGS.replace(column=column))


# Columns.


def test_a_column_within_another_is_a_path(tmp_path: Path) -> None:
    settings = SETTINGS.replace(column="body.text")
    nested = json.dumps({"body": {"text": "inner"}}) + "\n" + json.dumps({"body": None}) + "\n"
    assert texts(write(tmp_path / "a.jsonl", nested), settings) == ["inner", ""]
    assert texts(write(tmp_path / "b.jsonl", '{"body.text": "a name", "body": {"text": "no"}}'), settings) == ["a name"]
    refuse(write(tmp_path / "c.jsonl", '{"body": {"txt": ""}}'), "no column 'body.text'; .* one of 'body'", "body.text")


def test_a_column_within_a_column_of_parquet_is_a_path(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": [{"text": "inner", "n": 1}, None]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", SETTINGS.replace(column="body.text")) == ["inner", ""]
    refuse(tmp_path / "a.parquet", "no column 'text'; set data.column .* to one of 'body'")


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": [{"type": "text", "text": "Hi!"}]}]
RENDERED = "user: Hello\nassistant: Hi!"


def test_messages_become_lines_of_role_and_content(tmp_path: Path) -> None:
    chosen = write(tmp_path / "a.jsonl", json.dumps({"chat": CHAT}) + "\n")
    assert texts(chosen, SETTINGS.replace(column="chat")) == [RENDERED]
    found = write(tmp_path / "b.jsonl", json.dumps({"messages": CHAT}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    with logged() as sentences:
        assert [d.text for d in read_source(str(found), SETTINGS, "train")] == [RENDERED, "plain"]
    assert sentences == [f"{found}: 1 message list rendered as lines 'role: content'"]


def test_messages_of_parquet_are_found_too(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": None}]
    parquet.write_table(arrow.table({"messages": [messages]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["user: Hello\nassistant: "]


@pytest.mark.parametrize("value", [5, ["a"], [{"from": "x", "value": "y"}], [{"role": "user"}], {"role": "user"}])
def test_what_is_neither_text_nor_messages_is_refused(value: object, tmp_path: Path) -> None:
    kind = type(value).__name__
    refuse(write(tmp_path / "a.jsonl", json.dumps({"text": value})), f"line 1: column 'text' holds {kind}, not text or")


def test_a_row_unlike_those_before_is_named(tmp_path: Path) -> None:
    refuse(write(tmp_path / "a.jsonl", '{"text":"one"}\n{"txt":"two"}\n'), r"line 2: no column 'text', which earlier r")
    refuse(
        write(tmp_path / "b.jsonl", '{"txt":"one"}\n'), r"line 1: no column 'text'; set data\.column .* to one of 'txt'"
    )
    refuse(write(tmp_path / "c.json", '[{"text":"one"}, {"txt":"two"}]'), r"c\.json: object 2: no column 'text', which")


# JSON Lines.


def test_both_spellings_of_json_lines_are_read(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.ndjson", json_lines(ROWS))) == ROWS
    assert texts(write(tmp_path / "a.NDJSON.gz", gzip.compress(json_lines(ROWS)))) == ROWS


def test_json_that_python_cannot_hold_is_a_sentence(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    refuse(
        write(tmp_path / "a.jsonl", f'{{"text": "a", "more": {deep}}}'), "line 1 is not valid JSON .nested too deeply"
    )
    refuse(write(tmp_path / "a.json", f'{{"text": "a", "more": {deep}}}'), "not valid JSON at .*nested too deeply")
    refuse(write(tmp_path / "b.jsonl", '{"text": "a"} {"text": "b"}'), "line 1 is not valid JSON .Extra data")


def test_numbers_of_any_length_are_passed_over(tmp_path: Path) -> None:
    row = f'{{"id": {"7" * 5000}, "text": "a"}}'
    assert texts(write(tmp_path / "a.jsonl", row + "\n")) == ["a"]
    assert texts(write(tmp_path / "a.json", f"[{row}]")) == ["a"]


def test_half_a_surrogate_pair_is_no_failure(tmp_path: Path) -> None:
    row = '{"text": "a\\ud800", "\\udfff": 1}'
    assert texts(write(tmp_path / "a.jsonl", row)) == texts(write(tmp_path / "a.json", row)) == ["a\ud800"]


def test_a_line_too_long_to_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LARGEST", 100)
    line = json.dumps({"text": "x" * 200})
    refuse(write(tmp_path / "a.jsonl", '{"text": "a"}\n' + line), r"a\.jsonl: line 2 is longer than")
    refuse(write(tmp_path / "a.jsonl.gz", gzip.compress(line.encode())), r"a\.jsonl\.gz: line 1 is longer than")
    refuse(write(tmp_path / "a.csv", "text\n" + "x" * 200), r"a\.csv: line 2 is longer than")
    refuse(write(tmp_path / "b.csv", 'text\n"' + "x\n" * 200), r"b\.csv: line \d+: not valid CSV \(field larger than")
    monkeypatch.setattr(rows, "BLOCK", 64)
    refuse(write(tmp_path / "a.json", f'[{{"text": "a"}}, {line}]'), r"a\.json: not valid JSON at .*or a value longer")
    many = "{" + ", ".join(f'"{n}": "xxxxxxxxxx"' for n in range(20)) + "}"
    refuse(write(tmp_path / "b.json", many), r"b\.json: not valid JSON at .*an object longer than")


MEMORY = """
import sys
from gemmule.data.settings import DataSettings
from gemmule.data.sources import read_source
from gemmule.errors import SourceError
from gemmule.processes import peak_memory
try:
    for document in read_source(sys.argv[1], DataSettings(train="x"), "train"):
        print(len(document.text))
except SourceError as error:
    print(error)
print(peak_memory() >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_compressed_line_of_a_gibibyte_takes_little_memory(name: str, tmp_path: Path) -> None:
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write({"a.jsonl.gz": b'{"text": "', "a.json.gz": b'[{"text": "', "a.csv.gz": b'text\n"'}[name])
        for _ in range(1024):
            file.write(b"x" * (1 << 20))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / name)]
    sentence, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "64 MiB" in sentence
    assert int(peak) < 700


# JSON.


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one"}, {"text": "two"}]',
        ' [\n  {"text": "one", "id": 1},\n  {"id": 2, "text": "two"}\n]\n',
        '{"version": 1, "data": [{"text": "one"}, {"text": "two"}], "more": [1, {}]}',
        '{"text": "one"}\n{"text": "two"}\n',
        '{"text": "one"}[{"text": "two"}]',
        '\ufeff[{"text": "one"},{"text": "two"}]',
    ],
)
def test_json_is_a_list_or_data_or_objects(content: str, tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.json", content)) == ["one", "two"]


def test_a_single_object_is_a_document(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.json", '{"text": "one", "data": "of what"}')) == ["one"]
    assert texts(write(tmp_path / "b.json", "[]")) == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('ab"\\é{[,'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab,:", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(values, max_size=6), block=st.integers(1, 30), indent=st.sampled_from([None, 1]))
def test_json_read_in_blocks_is_what_reading_it_whole_gives(rows: list[Any], block: int, indent: int | None) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(block)

    raw = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    assert list(_JsonText(Slow(raw), File("a.json")).rows()) == rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "one"}, {"text": "tw', r"not valid JSON at character 18 \(Unterminated"),
        ('[{"text": "one"}', "truncated"),
        ('[{"text": "one"} {"text": "two"}]', r"at character 17 \('\{' where ',' is expected"),
        ('{"data": [{"text": "one"}], ', r"Expecting value"),
        ('["one"]', "object 1 is not a JSON object but str"),
        ("7", "object 1 is not a JSON object but int"),
        ("text", "Expecting value"),
    ],
)
def test_json_that_is_no_list_of_objects_is_refused(content: str, words: str, tmp_path: Path) -> None:
    refuse(write(tmp_path / "a.json", content), words)


def test_every_cut_of_a_json_file_is_noticed(tmp_path: Path) -> None:
    content = json.dumps({"data": [{"text": "one\u00e9"}, {"text": "two", "n": [1, 22]}], "v": 12}).encode()
    for length in range(1, len(content)):
        with pytest.raises(SourceError):
            texts(write(tmp_path / "a.json", content[:length]))


# CSV and TSV.


def test_records_are_read_by_the_name_of_their_column(tmp_path: Path) -> None:
    quoted = 'id,text\r\n1,"one, and ""more""\r\nof it"\r\n\r\n2,two\r\n'
    assert texts(write(tmp_path / "a.csv", quoted)) == ['one, and "more"\r\nof it', "two"]
    assert texts(write(tmp_path / "a.TSV", "id\ttext\n1\tone, two\n")) == ["one, two"]
    assert texts(write(tmp_path / "a.csv.gz", gzip.compress(b"\xef\xbb\xbftext\none\n"))) == ["one"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,body\n1,one\n", r"line 1: no column 'text'; set data\.column .* to one of 'id', 'body'"),
        ("id,text\n1,Hello, world\n", "line 2: 3 fields, where the header has 2 columns; quote fields with a ','"),
        ("id,text\n1\n", "line 2: 1 fields"),
        ('id,text\n1,"not closed\n2,two\n', "not valid CSV .unexpected end of data"),
        ('id,text\n1,"closed" too early\n', "line 2: not valid CSV"),
    ],
)
def test_records_that_do_not_fit_are_refused(content: str, words: str, tmp_path: Path) -> None:
    refuse(write(tmp_path / "a.csv", content), words)


def test_bytes_that_are_not_utf8_are_left_to_cleaning(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", b"text\ncaf\xe9\ntwo\n")
    assert texts(file) == ["caf\udce9", "two"]


# Parquet.


def test_long_rows_of_parquet_are_read_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LARGEST", 1000)
    assert texts(write_parquet(tmp_path / "a.parquet", ["x" * 900] * 5)) == ["x" * 900] * 5


def test_a_csv_file_with_another_delimiter_is_refused(tmp_path: Path) -> None:
    refuse(write(tmp_path / "a.csv", b"id;text\n0;one\n"), r"do not seem to be separated by ','; save it with commas")
