import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from runs import gemmule

TEXT = "The owl saw a red kite. Mia found it."


def explained(*arguments: object) -> dict[str, Any]:
    ended = gemmule("explain", *arguments, "--json")
    assert ended.code == 0, ended.err
    result: dict[str, Any] = json.loads(ended.out)
    return result


def test_one_model(tiny_run: Path, tmp_path: Path) -> None:
    result = explained(tiny_run, "--text", TEXT, "--out", tmp_path / "page.html")
    assert result.keys() == {"text", "models", "comparison"}
    assert (result["text"], result["comparison"]) == (TEXT, None)
    [model] = result["models"]
    assert model["model"] == str(tiny_run)
    assert "".join(token["text"] for token in model["tokens"][1:]) == TEXT
    assert len(model["lens"]) == len(model["attention"]) == 4
    assert "<h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_surprise_is_what_evaluate_measures(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    result = explained(tiny_run, "--file", tmp_path / "text.txt")
    ended = gemmule("evaluate", tiny_run, "--data", tmp_path / "text.txt", "--json")
    measured = json.loads(ended.out)
    [model] = result["models"]
    nats_of_all = measured["loss"] * measured["tokens"]  # the end of the document, too
    assert measured["tokens"] == len(model["tokens"])
    assert 0 < nats_of_all - model["bits"] * math.log(2) < 10


def test_a_file_loses_its_last_line_break(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"\r\n")
    assert explained(tiny_run, "--file", tmp_path / "text.txt")["text"] == TEXT


def test_before_and_after(tiny_run: Path, tmp_path: Path) -> None:
    first = min((tiny_run / "checkpoints").iterdir())
    result = explained(first, tiny_run, "--text", TEXT, "--out", tmp_path / "page.html")
    comparison = result["comparison"]
    assert comparison["same_tokenizer"]
    assert comparison["one_bits"] == pytest.approx(result["models"][0]["bits"])
    assert comparison["one_bits"] > comparison["other_bits"], "it has learned"
    assert "side by side" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_summary_names_the_most_surprising_tokens(tiny_run: Path) -> None:
    ended = gemmule("explain", tiny_run, "--text", TEXT)
    assert (ended.code, ended.err) == (0, f"reading with {tiny_run} ...\n")
    assert f"{tiny_run}: " in ended.out
    assert "bits per byte" in ended.out
    assert TEXT in ended.out
    assert "Most surprising" in ended.out


def test_text_is_no_markup_and_no_control_sequence_on_the_terminal(tiny_run: Path) -> None:
    ended = gemmule("explain", tiny_run, "--text", "[bold]The owl[/bold] saw \x1b[2J[red]")
    assert ended.code == 0
    assert "[bold]The owl[/bold] saw \ufffd[2J[red]" in ended.out
    assert "\x1b" not in ended.out


def test_what_cannot_be_explained_is_refused_in_a_sentence(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    (tmp_path / "there.html").write_text("mine")
    refused: list[tuple[list[object], str]] = [
        ([tiny_run], "--text, --file: name the text by one of them"),
        ([tiny_run, "--text", "a", "--file", "b"], "--text, --file: name the text by one of them"),
        ([tiny_run, "--text", ""], "--text: the text is empty; give a sentence or more"),
        ([tiny_run, "--file", tmp_path / "empty.txt"], "empty.txt: the text is empty"),
        ([tiny_run, "--file", tmp_path / "none.txt"], "none.txt: no such file"),
        ([tiny_run, "--file", tmp_path], "cannot be read: Is a directory"),
        ([tiny_run, "--file", tmp_path / "latin.txt"], "latin.txt: not UTF-8 text (invalid continuation byte, at 3)"),
        ([tiny_run, "--text", "\udcff"], "--text: not UTF-8 text (invalid start byte, at 0)"),
        ([tiny_run, "--text", TEXT * 2000], "tokens, but "),
        ([tiny_run, "--text", TEXT, "--out", tmp_path / "there.html"], "there.html: already exists; choose a new file"),
        ([tiny_run, tiny_run, tiny_run, "--text", TEXT], "3 are given; one is explained, or two are compared"),
        ([tmp_path / "nowhere", "--text", TEXT], "nowhere: no such folder"),
        ([tiny_run, "--text", TEXT, "--device", "gpu"], "device 'gpu'"),
    ]
    for options, words in refused:
        ended = gemmule("explain", *options)
        assert (ended.code, ended.out) == (2, ""), options
        assert words in ended.err.replace("\n", " ")
    assert (tmp_path / "there.html").read_text() == "mine"


def test_a_damaged_model_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    ended = gemmule("explain", tmp_path / "nan", "--text", TEXT)
    assert (ended.code, ended.out) == (2, "")
    assert "norm.weight holds NaN or infinity" in ended.err
