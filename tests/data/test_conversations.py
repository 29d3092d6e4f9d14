"""Conversations, preferences and prompts: every common form becomes one canonical JSON; what is wrong is named."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from source_files import SETTINGS, texts, write

from gemmule.data.clean import clean_document
from gemmule.data.conversations import row_document
from gemmule.data.sources import read_source
from gemmule.errors import SourceError

CONVERSATIONS, PREFERENCES, PROMPTS = (
    SETTINGS.replace(kind=kind) for kind in ("conversations", "preferences", "prompts")
)


def says(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


HELLO = '{"messages":[{"role":"user","content":"Hello"},{"role":"assistant","content":"Hi!"}]}'
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": says("Hello", "Hi!")},
    "parts": {"messages": [{"role": m["role"], "content": [{"text": m["content"]}]} for m in says("Hello", "Hi!")]},
    "model": {"messages": [says("Hello")[0], {"role": "model", "content": "Hi!"}]},
    "from and value": {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]},
    "prompt": {"prompt": "Hello", "completion": "Hi!"},
    "prompt of messages": {"prompt": says("Hello"), "completion": [{"role": "assistant", "content": "Hi!"}]},
    "instruction": {"instruction": "Hello", "input": "", "output": "Hi!"},
    "JSON in a column": {"messages": json.dumps(says("Hello", "Hi!"))},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_is_one_canonical_json(form: str, tmp_path: Path) -> None:
    row = FORMS[form]
    lines = write(tmp_path / "a.jsonl", json.dumps({"id": 1, "text": "other", **row}) + "\n")
    listed = write(tmp_path / "a.json", json.dumps([row]))
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(json.dumps(row).encode()))
    assert texts(lines, CONVERSATIONS) == texts(listed, CONVERSATIONS) == texts(packed, CONVERSATIONS) == [HELLO]
    if all(isinstance(value, str) for value in row.values()):
        with (tmp_path / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([row.keys(), row.values()])
        assert texts(tmp_path / "a.csv", CONVERSATIONS) == [HELLO]
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": [1]} | {name: [value] for name, value in row.items()}), tmp_path / "a.pq")
    assert texts((tmp_path / "a.pq").rename(tmp_path / "a.parquet"), CONVERSATIONS) == [HELLO]


def test_input_follows_the_instruction_and_system_comes_first() -> None:
    def messages(row: dict[str, Any]) -> Any:
        return json.loads(row_document(row, CONVERSATIONS, str).text)["messages"]

    row = {"instruction": "Translate.", "input": "Hund", "output": "dog", "system": "Be brief."}
    assert messages(row) == [{"role": "system", "content": "Be brief."}, *says("Translate.\n\nHund", "dog")]
    own = [{"role": "system", "content": "mine"}, *says("a", "b")]
    assert messages({"messages": own, "system": "Be brief."}) == own


def test_a_column_can_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"chat": says("Hello", "Hi!"), "messages": says("x", "y")}))
    assert texts(file, CONVERSATIONS.replace(column="chat")) == [HELLO]


BAD_CONVERSATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "twice the user": ({"messages": [*says("a"), *says("b")]}, "message 2: its role is 'user' where 'assistant' is"),
    "a tool": ({"messages": [*says("a"), {"role": "tool", "content": "b"}]}, "message 2: its role is 'tool' where"),
    "empty reply": ({"messages": says("a", " ")}, "message 2: the reply is empty; write one, or remove the row"),
    "empty completion": ({"prompt": "a", "completion": ""}, "message 2: the reply is empty"),
    "no reply": ({"messages": says("a")}, "has no reply to learn from; add a message of the assistant"),
    "no messages": ({"messages": []}, "messages is an empty list, not a list of messages with role and content"),
    "no text": ({"messages": [*says("a"), {"role": "assistant", "content": 5}]}, "message 2: its content is int, not"),
    "null": ({"prompt": "a", "completion": None}, "completion is missing, not a list of messages"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, *says("", "b")[1:]]},
        "message 1: its content has parts of type image; only text is learned",
    ),
    "words": ({"messages": ["a", "b"]}, "messages, message 1: is str, not an object of role and content"),
    "text": ({"messages": "Hello"}, "messages is text, not a list of messages"),
    "other columns": ({"text": "a"}, "data.kind = \"conversations\" needs the columns messages, .* there are 'text'"),
}


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_what_cannot_be_learned_from_is_named_with_file_and_line(name: str, tmp_path: Path) -> None:
    row, words = BAD_CONVERSATIONS[name]
    lines = write(tmp_path / "a.jsonl", f"{HELLO}\n\n{json.dumps(row)}\n")
    with pytest.raises(SourceError, match=rf"a\.jsonl: line 3: .*{words}"):
        texts(lines, CONVERSATIONS)


def test_a_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"prompt": ["a"] * 5, "completion": ["b", "b", "b", "", "b"]}
    parquet.write_table(arrow.table(rows), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(SourceError, match=r"a\.parquet: row 4: message 2: the reply is empty"):
        texts(tmp_path / "a.parquet", CONVERSATIONS)


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_plain_text_has_no_rows(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="plain text without rows"):
        texts(write(tmp_path / name, "Hello"), CONVERSATIONS)
    with pytest.raises(SourceError, match="storybook is text"):
        list(read_source("storybook:3", CONVERSATIONS, "train"))


PAIR = '{"messages":[{"role":"user","content":"Hello"}],"chosen":"Hi!","rejected":"No."}'
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Hello", "chosen": "Hi!", "rejected": "No."},
    "instruction": {"instruction": "Hello", "input": "", "output": "Hm", "chosen": "Hi!", "rejected": "No."},
    "messages": {"prompt": says("Hello"), "chosen": says("", "Hi!")[1:], "rejected": says("", "No.")[1:]},
    "whole conversations": {"chosen": says("Hello", "Hi!"), "rejected": says("Hello", "No.")},
    "and the prompt": {"prompt": "Hello", "chosen": says("Hello", "Hi!"), "rejected": says("Hello", "No.")},
}


@pytest.mark.parametrize("form", PAIRS)
def test_every_form_of_a_preference_is_one_canonical_json(form: str, tmp_path: Path) -> None:
    row = {"score": 0.5, **PAIRS[form]}
    assert texts(write(tmp_path / "a.jsonl", json.dumps(row)), PREFERENCES) == [PAIR]
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({name: [value] for name, value in row.items()}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", PREFERENCES) == [PAIR]


BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b "}, "chosen is equal to rejected"),
    "prompts": ({"chosen": says("a", "b"), "rejected": says("c", "d")}, "answer different prompts"),
    "another": ({"prompt": "x", "chosen": says("a", "b"), "rejected": says("a", "d")}, "prompt is not what chosen"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "has no prompt: add a column prompt"),
    "empty": ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen is empty; write a reply"),
    "no text": ({"prompt": "a", "chosen": 7, "rejected": "c"}, "chosen is int, not a list of messages"),
    "no reply": ({"chosen": says("a"), "rejected": says("b")}, "chosen does not end with a message of the assistant"),
    "roles": ({"prompt": says("a", "b"), "chosen": "c", "rejected": "d"}, "message 3: its role is 'assistant' where"),
    "a missing column": ({"prompt": "a", "chosen": "b"}, "needs the columns prompt, chosen and rejected"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_pair_without_a_preference_is_named(name: str, tmp_path: Path) -> None:
    row, words = BAD_PAIRS[name]
    with pytest.raises(SourceError, match=rf"a\.jsonl: line 2: .*{words}"):
        texts(write(tmp_path / "a.jsonl", f"{PAIR_ROW}\n{json.dumps(row)}\n"), PREFERENCES)


PAIR_ROW = json.dumps(PAIRS["texts"])


def test_a_prompt_keeps_what_a_reward_needs(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2?", "answer": "4"}, {"messages": says("Hm"), "task": {"n": 1}, "id": 9}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [json.loads(text) for text in texts(file, PROMPTS)] == [
        {"messages": says("2 + 2?"), "task": {"answer": "4"}},
        {"messages": says("Hm"), "task": {"n": 1}},
    ]
    with pytest.raises(SourceError, match="messages ends with a reply"):
        texts(write(tmp_path / "b.jsonl", HELLO), PROMPTS)


def cleaned(row: dict[str, Any], **settings: Any) -> tuple[Any, Counter[str]]:
    tally = Counter[str]()
    document = clean_document(row_document(row, CONVERSATIONS, str), CONVERSATIONS.replace(**settings), tally)
    return document and json.loads(document.text), tally


def test_texts_are_cleaned_one_by_one_and_never_the_json() -> None:
    row, tally = cleaned({"prompt": " cafÃ©\r\n \\r\\n ", "completion": '"Hi"\n'})
    assert row == {"messages": says("café\n \\r\\n", '"Hi"')}
    assert tally["repaired"] == 1
    assert cleaned({"prompt": "a", "completion": "\ud800"}) == (None, Counter(read=1, not_utf8=1, repaired=0))


def test_filters_see_the_texts_of_a_conversation() -> None:
    row = {"prompt": "four", "completion": "five"}
    assert cleaned(row, max_characters=10)[0] is not None
    assert cleaned(row, max_characters=9)[1]["too_long"] == 1
    assert cleaned(row, drop_matching="role")[0] is not None
    assert cleaned(row, drop_matching="^five")[0] is not None
    assert cleaned(row, drop_matching="five$")[1]["unwanted"] == 1
