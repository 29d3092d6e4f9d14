"""`gemmule prepare --show`: what will be learned, from the shards, on the terminal and as a page."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from gemmule.cli import examples as module
from gemmule.data.dataset import open_dataset
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import CHAT_TEMPLATE
from run_folders import Page
from runs import gemmule, write_text

pytestmark = pytest.mark.usefixtures("without_plots")

HOSTILE = '<script>alert(1)</script> {{ 7 * 7 }} [bold]x[/bold] </span> "quoted" \x1b[31m'


@pytest.fixture
def tokenizer(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    tiny_tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def conversations(folder: Path, count: int = 60, reply: str = "The reply") -> Path:
    file = folder / "chats.jsonl"
    rows = [{"prompt": f"Question {number}", "completion": f"{reply} {number}"} for number in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_examples_are_printed_and_written_as_a_page(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    options = ["--kind", "conversations", "--tokenizer", tokenizer, "--out", out, "--show", 3]
    ended = gemmule("prepare", conversations(tmp_path), *options)
    assert ended.code == 0, ended.err
    assert len(re.findall(r"user\nQuestion (\d+)<end_of_turn>", ended.out)) == 3
    assert len(re.findall(r"<start_of_turn>model\n\[\[The reply \d+<end_of_turn>\]\]", ended.out)) == 3
    assert re.search(r"train: [\d,]+ of [\d,]+ tokens \([\d.]+%\) are trained: template 0 of", ended.err)
    assert 'data.kind = "conversations"' in ended.err
    again = gemmule("prepare", out, "--show", 3)
    assert again.out == ended.out
    page = Page((out / "examples.html").read_text(encoding="utf-8"))
    trained = [attributes for tag, attributes in page.tags if "trained" in (attributes.get("class") or "").split()]
    assert len(trained) == 1 + 3
    assert "are trained" in page.text
    assert page.text.count("The reply") == 3


def test_it_reads_the_shards_and_not_the_rule(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    gemmule("prepare", conversations(tmp_path), "--kind", "conversations", "--tokenizer", tokenizer, "--out", out)
    corpus = open_dataset(out).train
    file = corpus.shards[0].path
    raw = bytearray(file.read_bytes())
    raw[corpus.shards[0].header.mask_start] |= 0x80  # bos of the first document is now trained, too
    file.write_bytes(raw)
    assert gemmule("prepare", out, "--show", 1).code == 2  # and the checksum says that it was changed
    from gemmule.data import shards

    damaged = shards.open_shard(file, open_dataset(out, verify=False).tokenizer.fingerprint)
    assert damaged.read_mask(0, 1).tolist() == [True]
    dataset = open_dataset(out, verify=False)
    assert next(module._examples(dataset, 1)).segments[0].trained


def test_text_of_the_data_is_never_markup(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    source = conversations(tmp_path, reply=HOSTILE)
    options = ["--kind", "conversations", "--tokenizer", tokenizer, "--out", out, "--show", 1]
    ended = gemmule("prepare", source, *options)
    assert "\x1b" not in ended.out
    assert "[bold]x[/bold]" in ended.out
    html = (out / "examples.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    page = Page(html)
    assert HOSTILE.replace("\x1b", "") in page.text.replace("\x1b", "")


def test_trained_tokens_are_in_color_on_a_terminal(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    gemmule("prepare", conversations(tmp_path), "--kind", "conversations", "--tokenizer", tokenizer, "--out", out)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    module._print(console, next(module._examples(open_dataset(out), 1)))
    assert isinstance(console.file, io.StringIO)
    assert re.search(r"\x1b\[30;42mThe reply \d+<end_of_turn>\x1b\[0m", console.file.getvalue())


def test_text_is_shown_too(tmp_path: Path) -> None:
    write_text(tmp_path / "train.txt", 50)
    ended = gemmule("prepare", tmp_path / "train.txt", "--vocab-size", 300, "--out", tmp_path / "out", "--show", 2)
    assert ended.code == 0, ended.err
    assert ended.out.count("[[<bos>") == 2


def test_a_folder_is_needed_where_nothing_is_prepared(tmp_path: Path) -> None:
    ended = gemmule("prepare", conversations(tmp_path), "--show", 2)
    assert ended.code == 2
    assert "name the folder of the dataset" in ended.err


def test_a_model_that_learns_from_conversations_brings_a_template(tmp_path: Path, tokenizer: Path) -> None:
    assert Tokenizer.load(tokenizer).chat_template is None
    out = tmp_path / "out"
    gemmule("prepare", conversations(tmp_path), "--kind", "conversations", "--tokenizer", tokenizer, "--out", out)
    found = open_dataset(out).tokenizer
    assert found.chat_template == CHAT_TEMPLATE
    assert found.fingerprint == Tokenizer.load(tokenizer).fingerprint


def test_bad_rows_end_in_one_sentence_and_leave_nothing(tmp_path: Path, tokenizer: Path) -> None:
    source = conversations(tmp_path)
    with source.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "a", "completion": " "}\n')
    out = tmp_path / "out"
    ended = gemmule("prepare", source, "--kind", "conversations", "--tokenizer", tokenizer, "--out", out)
    assert ended.code == 2
    assert f"{source}: line 61: message 2: the reply is empty; write one, or remove the row" in ended.err
    assert not out.exists()
