import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmule.generate import native
from gemmule.generate.sampling import STORYTELLING
from runs import gemmule

EOS = 1


def generate(model: Path, *options: object) -> str:
    ended = gemmule("generate", model, *options)
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def test_a_prompt_is_continued(tiny_run: Path) -> None:
    text = generate(tiny_run, "--prompt", "Mia found", "--max-new-tokens", 20, "--seed", 1)
    assert text.startswith("Mia found")
    assert text.endswith("\n")
    assert len(text) > len("Mia found\n")


def test_a_seed_repeats_and_another_does_not(tiny_run: Path) -> None:
    one, again, other = (generate(tiny_run, "--max-new-tokens", 20, "--seed", seed) for seed in (1, 1, 2))
    assert one == again != other
    assert generate(tiny_run, "--max-new-tokens", 20) != generate(tiny_run, "--max-new-tokens", 20)


def test_a_run_folder_means_its_newest_checkpoint(tiny_run: Path) -> None:
    options = ["--max-new-tokens", 20, "--seed", 1]
    from_run = generate(tiny_run, *options)
    assert from_run == generate(tiny_run / "model", *options)
    assert from_run == generate(tiny_run / "checkpoints" / "step-00000012", *options)
    assert from_run != generate(tiny_run / "checkpoints" / "step-00000009", *options)


@pytest.mark.parametrize("narrow", [["--temperature", 0], ["--top-k", 1], ["--top-p", 0.000001], ["--min-p", 0.999999]])
def test_every_rule_can_narrow_the_choice_to_the_likeliest(tiny_run: Path, narrow: list[object]) -> None:
    texts = {generate(tiny_run, "--max-new-tokens", 12, "--seed", seed, *narrow) for seed in (1, 2)}
    assert texts == {generate(tiny_run, "--max-new-tokens", 12, "--temperature", 0)}


def test_stories_are_told_the_same_way_everywhere(tiny_run: Path) -> None:
    named = ["--temperature", STORYTELLING.temperature, "--min-p", STORYTELLING.min_p]
    options = ["--max-new-tokens", 20, "--seed", 1]
    assert generate(tiny_run, *options, *named) == generate(tiny_run, *options)
    assert generate(tiny_run, *options, "--temperature", 1.0, "--min-p", 0) != generate(tiny_run, *options)


def test_json_tells_prompt_text_tokens_and_why_it_ended(tiny_run: Path) -> None:
    options = ["--prompt", "Tom", "--max-new-tokens", 9, "--seed", 3]
    reply = json.loads(generate(tiny_run, *options, "--json"))
    assert set(reply) == {"prompt", "text", "tokens", "finish"}
    assert (reply["prompt"], reply["tokens"], reply["finish"]) == ("Tom", 9, "length")
    assert generate(tiny_run, *options) == f"Tom{reply['text']}\n"


def test_generation_stops_at_the_end_token(tiny_run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_run / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    # All tokens point the same way, and the end token furthest, so that it is always the likeliest.
    embedding = torch.full_like(weights["model.embed_tokens.weight"], 0.1)
    embedding[EOS] = 1.0
    save_file(weights | {"model.embed_tokens.weight": embedding}, model / "model.safetensors")
    reply = json.loads(generate(model, "--max-new-tokens", 5, "--temperature", 0, "--json"))
    assert (reply["text"], reply["tokens"], reply["finish"]) == ("", 1, "stop")


def test_every_way_of_decoding_tells_the_same_story(tiny_run: Path) -> None:
    options = ["--max-new-tokens", 20, "--temperature", 0]
    assert len({generate(tiny_run, *options, *way) for way in ([], ["--decoding", "plain"])}) == 1
    assert generate(tiny_run, *options, "--int8").startswith("Once upon a time")


def test_a_slower_way_is_told(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    native._library.cache_clear()
    ended = gemmule("generate", tiny_run, "--max-new-tokens", 3)
    native._library.cache_clear()
    assert ended.code == 0
    assert ended.err == "note: no C compiler (cc) was found; so tokens come more slowly than they could\n"


def test_int8_and_compiled_do_not_go_together(tiny_run: Path) -> None:
    ended = gemmule("generate", tiny_run, "--int8", "--decoding", "compiled", "--max-new-tokens", 3)
    assert (ended.code, ended.out) == (2, "")
    assert "decoding 'compiled': the weights are int8; use 'plain' or 'auto'" in ended.err


def test_an_empty_prompt_begins_a_text(tiny_run: Path) -> None:
    assert generate(tiny_run, "--prompt", "", "--max-new-tokens", 20, "--seed", 1) != "\n"


def piped(command: list[str], stdout: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start a command as users do, whose Python keeps what it prints until there is enough of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=stdout, stderr=pipe, text=True, env=environment)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_to_a_full_disk_ends_in_a_sentence(tiny_run: Path) -> None:
    command = [sys.executable, "-m", "gemmule", "generate", str(tiny_run), "--max-new-tokens", "3"]
    with Path("/dev/full").open("w") as full, piped(command, stdout=full) as process:
        assert process.stderr is not None
        assert process.stderr.read() == "gemmule: output: no space left on the device\n"
    assert process.returncode == 2


LAST_WORDS = """
import sys, typer
from gemmule.cli.main import graceful
app = typer.Typer()
@app.command()
@graceful
def tell():
    print("first", flush=True)
    sys.stdin.read()  # until the reader has gone
    print("last")
app()
"""


def test_a_reader_that_leaves_before_the_last_words_is_no_failure() -> None:
    with piped([sys.executable, "-c", LAST_WORDS]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_reader_that_has_seen_enough_is_no_failure(tiny_run: Path) -> None:
    command = [sys.executable, "-m", "gemmule", "generate", str(tiny_run), "--max-new-tokens", "2000"]
    with piped(command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(9) == "Once upon"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
