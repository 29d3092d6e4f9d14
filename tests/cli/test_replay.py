import json
from pathlib import Path
from typing import Any

import pytest

from runs import gemmule

SESSION = "\n".join(
    [
        "/set max_tokens 12", "/set seed 3", "Mia found", "", "the owl", "/retry", '/set stop ["e", "o"]',
        "/edit 1 Tom saw",
        "a key",
        "/set min_tokens 4", "/set repetition_penalty 1.3", "/set presence_penalty 0.5", "", "/branch 1", "on",
    ]
)  # fmt: skip


def session(model: Path, file: Path, *options: str) -> dict[str, Any]:
    """Write a file of a session with branches and all kinds of settings; return it."""
    assert gemmule("chat", model, *options, given=f"{SESSION}\n/save {file}\n".encode()).code == 0
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document


def write(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("kind", ["--story", "--turns"])
def test_every_reply_is_repeated_token_for_token(tiny_run: Path, tmp_path: Path, kind: str) -> None:
    document = session(tiny_run, tmp_path / "talk.json", kind)
    replies = sum(piece["author"] == "model" for piece in document["pieces"])
    ended = gemmule("generate", tiny_run, "--replay", tmp_path / "talk.json")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith(f"all {replies} replies are the same, token for token\n")


def test_the_first_token_that_differs_is_named(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    document = session(tiny_run, file)
    tokens = document["pieces"][1]["tokens"]
    wrong = 300 if tokens[3] != 300 else 301
    document["pieces"][1]["tokens"] = [*tokens[:3], wrong, *tokens[4:]]
    write(file, document)
    ended = gemmule("generate", tiny_run, "--replay", file)
    assert ended.code == 1
    assert f"piece 2: token 4 of {len(tokens)} differs: {tokens[3]} (" in ended.out
    assert f"instead of {wrong} (" in ended.out
    assert f"--replay {file}: " in ended.err
    told = json.loads(gemmule("generate", tiny_run, "--replay", file, "--json").out)
    assert not told["same"]
    assert (told["pieces"][0]["same"], told["pieces"][0]["differs_at"]) == (False, 4)


def test_another_fingerprint_is_told(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    document = session(tiny_run, file)
    document["pieces"][1]["fingerprint"] = "fp_other"
    write(file, document)
    ended = gemmule("generate", tiny_run, "--replay", file)
    assert ended.code == 0
    assert ended.err.startswith("note: this model's fingerprint is fp_")
    assert ended.err.endswith(", the file has fp_other\n")
    other = gemmule("generate", tiny_run / "checkpoints" / "step-00000009", "--replay", tmp_path / "talk.json")
    assert other.code == 1
    assert "note: this model's fingerprint is fp_" in other.err


def test_a_list_of_turns_of_another_writer_is_read(tiny_run: Path, tmp_path: Path) -> None:
    document = session(tiny_run, tmp_path / "talk.json", "--turns")
    names = ("author", "text", "tokens", "settings", "seed")
    turns = [{name: piece[name] for name in names if name in piece} for piece in document["pieces"][:2]]
    turns[1]["settings"] |= {"stream": True, "logprobs": 5, "stop": None}
    write(tmp_path / "page.json", {"turns": turns, "made_by": "a page"})
    assert gemmule("generate", tiny_run, "--replay", tmp_path / "page.json").code == 0


def test_the_tokens_that_the_model_read_may_be_told(tiny_run: Path, tmp_path: Path) -> None:
    document = session(tiny_run, tmp_path / "talk.json")
    mine, its = document["pieces"][:2]
    read = [2, *mine["tokens"]]
    write(tmp_path / "one.json", {"pieces": [its | {"prompt_tokens": read, "parent": None}]})
    assert gemmule("generate", tiny_run, "--replay", tmp_path / "one.json").code == 0


def test_what_the_page_exports_is_repeated(tiny_run: Path, tmp_path: Path) -> None:
    mine, its = session(tiny_run, tmp_path / "talk.json")["pieces"][:2]
    tokens = [{"id": token, "text": "x", "top": []} for token in its["tokens"][:5]]
    drawn = {"prompt_ids": [2, *mine["tokens"]], "tokens": tokens, "seed": its["seed"], "fingerprint": "fp_x"}
    drawn["request"] = its["settings"] | {"model": "tiny", "logprobs": 8}
    chosen = {"prompt_ids": [2], "tokens": [{"id": 300, "text": "x", "top": []}], "chosen": True}
    sheet = {"mode": "sheet", "generations": {"a": drawn, "b": chosen}}
    write(tmp_path / "page.json", {"format": "gemmule-sheets", "version": 1, "sheets": [sheet]})
    ended = gemmule("generate", tiny_run, "--replay", tmp_path / "page.json")
    assert ended.code == 0
    assert ended.out.startswith(f"piece 1: all {len(tokens)} tokens are the same\n")
    write(tmp_path / "page.json", {"format": "gemmule-sheets", "sheets": [{"generations": 3}]})
    assert "a damaged file" in gemmule("generate", tiny_run, "--replay", tmp_path / "page.json").err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no JSON file"),
        ("[]", "no conversation; it has no list of pieces or turns"),
        ('{"pieces": [{"author": "me"}]}', "piece 1: author = 'me': must be \"user\" or \"model\""),
        ('{"pieces": [{"author": "user"}]}', "piece 1: text = None: must be text"),
        ('{"pieces": [{"author": "user", "text": "", "tokens": [true]}]}', "piece 1: tokens: must be a list"),
        ('{"pieces": [{"author": "user", "text": "", "parent": 0}]}', "piece 1: parent = 0: must be the number"),
        ('{"pieces": [{"author": "model", "text": "", "seed": -1}]}', "piece 1: seed = -1: must be from 0"),
        ('{"pieces": [], "version": 9}', "a conversation of version 9; this Gemmule reads 1"),
        ('{"pieces": [], "current": 3}', "current = 3: must be the number of a piece"),
        ('{"pieces": [{"author": "model", "text": "", "settings": {"top_p": 7}}]}', "top_p = 7"),
        ('{"pieces": [{"author": "user", "text": "Mia"}]}', "no piece has the tokens and the seed"),
        ('{"pieces": [{"author": "model", "text": "", "seed": 1, "tokens": [1], "prompt_tokens": [999]}]}', "no token"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_repeated_is_refused(tiny_run: Path, tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    ended = gemmule("generate", tiny_run, "--replay", file)
    assert ended.code == 2
    assert sentence in ended.err


def test_options_without_effect_beside_replay_are_refused(tiny_run: Path) -> None:
    ended = gemmule("generate", tiny_run, "--replay", "x.json", "--temperature", 1)
    assert ended == (2, "", "gemmule: --replay leaves --temperature without effect; give one of them\n")
