import json
from pathlib import Path
from typing import Any

import pytest

from runs import gemmule
from saved_sheets import read_sheet_of

SESSION = "\n".join(
    [
        "/set max_tokens 12", "/set min_tokens 6", "/set seed 5", "Mia found", "/set min_tokens 0", "",
        "the owl", "/retry", '/set stop ["e", "o"]', "/edit 1 Tom saw",
        "a key",
        "/set min_tokens 4", "/set repetition_penalty 1.3", "/set presence_penalty 0.5", "", "/branch 1", "on",
    ]
)  # fmt: skip


def session(model: Path, file: Path, *options: str) -> Any:
    """Write a file of a session with branches and all kinds of settings; return its sheet."""
    assert gemmule("chat", model, *options, given=f"{SESSION}\n/save {file}\n".encode()).code == 0
    return read_sheet_of(file)


def write(file: Path, *sheets: Any) -> None:
    file.write_text(json.dumps({"format": "gemmule-sheets", "version": 1, "sheets": sheets}), encoding="utf-8")


def replies(sheet: Any) -> list[Any]:
    return [*sheet["generations"].values()]


@pytest.mark.parametrize("kind", ["--story", "--turns"])
def test_every_reply_is_repeated_token_for_token(tiny_run: Path, tmp_path: Path, kind: str) -> None:
    sheet = session(tiny_run, tmp_path / "talk.json", kind)
    ended = gemmule("generate", tiny_run, "--replay", tmp_path / "talk.json")
    assert (ended.code, ended.err) == (0, "")
    assert len(replies(sheet)) >= 6
    assert ended.out.endswith(f"all {len(replies(sheet))} replies are the same, token for token\n")


def test_the_first_token_that_differs_is_named(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    sheet = session(tiny_run, file)
    tokens = replies(sheet)[0]["tokens"]
    was = tokens[3]["id"]
    wrong = tokens[3]["id"] = 300 if was != 300 else 301
    write(file, sheet)
    ended = gemmule("generate", tiny_run, "--replay", file)
    assert ended.code == 1
    assert f"Mia found, reply 1: token 4 of {len(tokens)} differs: {was} (" in ended.out
    assert f"instead of {wrong} (" in ended.out
    assert f"--replay {file}: " in ended.err
    described = json.loads(gemmule("generate", tiny_run, "--replay", file, "--json").out)
    assert not described["same"]
    assert (described["replies"][0]["same"], described["replies"][0]["differs_at"]) == (False, 4)


def test_a_reply_must_end_where_it_ended(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    sheet = session(tiny_run, file)
    first = replies(sheet)[0]
    first["tokens"] = first["tokens"][:4]
    (node,) = (node for node in sheet["nodes"].values() if node.get("generation") == first["id"])
    node["to"] = 4
    write(file, sheet)
    assert gemmule("generate", tiny_run, "--replay", file).code == 0, "stopped by the user, as far as anybody knows"
    first["finish"] = "stop"
    write(file, sheet)
    ended = gemmule("generate", tiny_run, "--replay", file)
    assert ended.code == 1
    assert "reply 1: token 5 of 4 differs: " in ended.out
    assert "instead of nothing" in ended.out


def test_replies_of_other_models_are_left_out_unless_all_are(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    sheet = session(tiny_run, file)
    count = len(replies(sheet))
    replies(sheet)[0]["fingerprint"] = "fp_other"
    write(file, sheet)
    ended = gemmule("generate", tiny_run, "--replay", file)
    assert ended.code == 0
    assert ended.out.endswith(f"all {count - 1} replies are the same, token for token\n")
    assert ended.err.startswith("note: this model's fingerprint is fp_")
    assert ended.err.endswith(", the file has fp_other; 1 replies of others are left out\n")
    for reply in replies(sheet):
        reply["fingerprint"] = "fp_other"
    write(file, sheet)
    assert gemmule("generate", tiny_run, "--replay", file).out.endswith(
        f"all {count} replies are the same, token for token\n"
    )
    other = gemmule("generate", tiny_run / "checkpoints" / "step-00000009", "--replay", file)
    assert other.code == 1
    assert "note: this model's fingerprint is fp_" in other.err


def test_what_the_page_exports_is_repeated(tiny_run: Path, tmp_path: Path) -> None:
    sheet = session(tiny_run, tmp_path / "talk.json")
    drawn, *_ = replies(sheet)
    drawn["request"] |= {"logprobs": 8, "return_token_ids": True, "stop": None}
    drawn["tokens"] = drawn["tokens"][:5]
    chosen = {"prompt_ids": [2], "tokens": [{"id": 300, "text": "x", "top": []}], "chosen": True}
    page = SHEET | {"generations": {"a": drawn, "b": chosen}}
    write(tmp_path / "page.json", page, page | {"title": "B"})
    ended = gemmule("generate", tiny_run, "--replay", tmp_path / "page.json")
    assert ended.code == 0
    assert ended.out.startswith("A, reply 1: all 5 tokens are the same\nB, reply 1: all 5 tokens are the same\nall 2")


SHEET: dict[str, Any] = {
    "id": "s", "title": "A", "mode": "sheet", "model": "m", "created": 0, "changed": 0, "settings": {},
    "nodes": {"r": {"id": "r", "parent": None, "children": [], "by": "you", "text": ""}},
    "root": "r", "current": "r", "generations": {},
}  # fmt: skip
REPLY: dict[str, Any] = {"id": "g", "prompt_ids": [2], "tokens": [{"id": 9, "text": "x", "top": []}], "seed": 1}
LOOP = {"r": SHEET["nodes"]["r"], "a": {"id": "a", "parent": "a", "children": ["a"], "by": "you", "text": ""}}


def with_reply(**changes: Any) -> dict[str, Any]:
    return {"generations": {"g": REPLY | changes}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "poem"}, "sheet 1 is damaged: its mode is 'poem'"),
        ({"nodes": 3}, "sheet 1 is damaged: "),
        ({"root": "x"}, "sheet 1 is damaged: 'x' is missing"),
        ({"current": "x"}, "sheet 1 is damaged: its current node is missing"),
        ({"nodes": LOOP}, "sheet 1 is damaged: its nodes are no tree"),
        ({"settings": {"top_p": "7"}}, "top_p = 7"),
        ({"settings": {"top_p": "x"}}, "sheet 1 is damaged: "),
        (with_reply(seed=-1), "generation g: seed = -1: out of range"),
        (with_reply(tokens=[{"id": True, "text": "x"}]), "generation g: token ids must be from 0"),
        (with_reply(request={"top_p": 7}), "top_p = 7"),
        (with_reply(seed=None), "no reply has the tokens and the seed that repeat it"),
        (with_reply(prompt_ids=[99999]), "there is no token 99999"),
        ({}, "no reply has the tokens and the seed"),
    ],
)  # fmt: skip
def test_a_damaged_sheet_is_refused(tiny_run: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    write(tmp_path / "talk.json", SHEET | changes)
    ended = gemmule("generate", tiny_run, "--replay", tmp_path / "talk.json")
    assert ended.code == 2
    assert sentence in ended.err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no JSON file"),
        ("[]", "is not of the format gemmule-sheets, which `gemmule chat` saves and the page exports"),
        ('{"format": "gemmule-sheets", "version": 9}', "has version 9; this Gemmule reads 1"),
        ('{"format": "gemmule-sheets", "version": 1}', "has no list of sheets"),
        ('{"format": "gemmule-sheets", "version": 1, "sheets": [3]}', "sheet 1 is damaged: "),
    ],
)
def test_a_file_of_another_kind_is_refused(tiny_run: Path, tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    ended = gemmule("generate", tiny_run, "--replay", file)
    assert ended.code == 2
    assert sentence in ended.err


def test_options_without_effect_beside_replay_are_refused(tiny_run: Path) -> None:
    ended = gemmule("generate", tiny_run, "--replay", "x.json", "--temperature", 1)
    assert ended == (2, "", "gemmule: --replay leaves --temperature without effect; give one of them\n")
