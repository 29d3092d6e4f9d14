import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmule.cli.generate import input_is_redirected
from gemmule.inference.native.library import load_library
from gemmule.inference.sampling import STORYTELLING
from runs import gemmule

EOS = 1


def generate(model: Path, *options: object, given: str = "") -> str:
    ended = gemmule("generate", model, *options, given=given.encode())
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
    assert set(reply) == {"prompt", "text", "tokens", "finish", "seed"}
    assert (reply["prompt"], reply["tokens"], reply["finish"], reply["seed"]) == ("Tom", 9, "length", 3)
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
    load_library.cache_clear()
    ended = gemmule("generate", tiny_run, "--max-new-tokens", 3)
    load_library.cache_clear()
    assert ended.code == 0
    assert ended.err == "note: no C compiler (no-such-compiler) was found; decoding is slower without the native step\n"


def test_int8_and_compiled_do_not_go_together(tiny_run: Path) -> None:
    ended = gemmule("generate", tiny_run, "--int8", "--decoding", "compiled", "--max-new-tokens", 3)
    assert (ended.code, ended.out) == (2, "")
    assert "decoding 'compiled': the weights are int8; use 'plain' or 'auto'" in ended.err


def test_an_empty_prompt_begins_a_text(tiny_run: Path) -> None:
    assert generate(tiny_run, "--prompt", "", "--max-new-tokens", 20, "--seed", 1) != "\n"


def test_without_a_seed_the_one_that_was_drawn_is_told(tiny_run: Path) -> None:
    told = json.loads(generate(tiny_run, "--max-new-tokens", 9, "--json"))
    assert json.loads(generate(tiny_run, "--max-new-tokens", 9, "--json", "--seed", told["seed"])) == told


def test_a_stop_string_ends_the_text_before_it(tiny_run: Path) -> None:
    options = ["--max-new-tokens", 30, "--min-new-tokens", 30, "--seed", 1]
    text = generate(tiny_run, *options).removeprefix("Once upon a time").removesuffix("\n")
    one, two = text[8:10], text[12:14]
    told = json.loads(generate(tiny_run, *options, "--stop", two, "--stop", one, "--json"))
    assert told["text"] == text[: min(text.index(one), text.index(two))]
    assert told["finish"] == "stop"
    ended = gemmule("generate", tiny_run, "--stop", "")
    assert ended.code == 2
    assert 'stop = ""' in ended.err


def test_before_the_least_length_no_stop_token_is_drawn(tiny_run: Path) -> None:
    options = ["--max-new-tokens", 60, "--json", "--min-new-tokens", 60]
    assert {json.loads(generate(tiny_run, *options, "--seed", seed))["tokens"] for seed in range(3)} == {60}


@pytest.mark.parametrize(
    "penalty", [["--repetition-penalty", 3], ["--presence-penalty", 2], ["--frequency-penalty", 2]]
)
def test_penalties_make_a_text_repeat_itself_less(tiny_run: Path, penalty: list[object]) -> None:
    options = ["--max-new-tokens", 60, "--min-new-tokens", 60, "--temperature", 0]
    plain, varied = (generate(tiny_run, *options, *more) for more in ([], penalty))
    shares = [len({text[at : at + 4] for at in range(len(text))}) / len(text) for text in (plain, varied)]
    assert shares[1] > shares[0]


def test_a_penalty_out_of_range_is_refused(tiny_run: Path) -> None:
    ended = gemmule("generate", tiny_run, "--repetition-penalty", 0)
    assert ended.code == 2
    assert "repetition_penalty = 0.0: must be a number above 0" in ended.err
    assert gemmule("generate", tiny_run, "--presence-penalty", 3).code == 2


def test_several_samples_have_seeds_that_repeat_each(tiny_run: Path) -> None:
    options = ["--prompt", "Tom", "--max-new-tokens", 9]
    alone = [generate(tiny_run, *options, "--seed", seed) for seed in (7, 8, 9)]
    together = generate(tiny_run, *options, "--seed", 7, "--num-samples", 3)
    assert together == "\n".join(f"--- sample {n + 1} of 3, seed {7 + n} ---\n{alone[n]}" for n in range(3))
    reply = json.loads(generate(tiny_run, *options, "--seed", 7, "--num-samples", 3, "--json"))
    assert set(reply) == {"prompt", "samples"}
    assert [f"Tom{sample['text']}\n" for sample in reply["samples"]] == alone
    assert [sample["seed"] for sample in reply["samples"]] == [7, 8, 9]


def test_the_largest_seed_is_followed_by_zero(tiny_run: Path) -> None:
    options = ["--max-new-tokens", 3, "--seed", 2**64 - 1, "--num-samples", 2, "--json"]
    assert [sample["seed"] for sample in json.loads(generate(tiny_run, *options))["samples"]] == [2**64 - 1, 0]


@pytest.mark.parametrize("seed", [-1, 2**64, 99999999999999999999])
def test_a_seed_out_of_range_is_refused(tiny_run: Path, seed: int) -> None:
    ended = gemmule("generate", tiny_run, "--seed", seed)
    assert (ended.code, ended.out) == (2, "")
    words = " ".join(ended.err.replace("│", " ").split())
    assert "Invalid value for '--seed'" in words
    assert ("0" if seed < 0 else "18446744073709551615") in words


@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", "nan"), ("--temperature", "inf"), ("--top-p", "nan"), ("--min-p", "nan")]
)
def test_numbers_that_are_not_finite_are_refused(tiny_run: Path, option: str, value: str) -> None:
    ended = gemmule("generate", tiny_run, option, value)
    assert (ended.code, ended.out) == (2, "")
    assert option in ended.err or f"{option.removeprefix('--').replace('-', '_')} = " in ended.err
    assert "must be" in ended.err or "should be" in ended.err


def test_a_prompt_is_read_from_standard_input(tiny_run: Path) -> None:
    options = ["--max-new-tokens", 9, "--seed", 1]
    for given in ("Tom saw\n", "Tom saw", "\ufeffTom saw\r\n"):
        assert generate(tiny_run, "--prompt", "-", *options, given=given) == generate(
            tiny_run, "--prompt", "Tom saw", *options
        )
    assert generate(tiny_run, "--prompt", "-", *options, given="Zoé\n\n").startswith("Zoé\n")


def test_a_prompt_that_is_not_utf8_is_blamed_for_it(tiny_run: Path) -> None:
    for given, options in ((b"a\xff", ["-"]), (b"", [b"a\xff".decode("utf-8", "surrogateescape")])):
        ended = gemmule("generate", tiny_run, "--prompt", *options, given=given)
        assert ended == (2, "", "gemmule: the prompt is not UTF-8 text: invalid start byte at byte 1\n")
    ended = gemmule("generate", tiny_run, "--prompt", "ab\ud800")
    assert ended == (2, "", "gemmule: the prompt is not UTF-8 text: surrogates not allowed at character 2\n")


def test_bytes_that_the_locale_could_not_decode_are_read_as_utf8(tiny_run: Path) -> None:
    ascii_only = "Zoé".encode().decode("ascii", "surrogateescape")
    assert generate(tiny_run, "--prompt", ascii_only, "--max-new-tokens", 3).startswith("Zoé")


def test_a_text_given_as_an_argument_is_told_to_be_an_option(tiny_run: Path) -> None:
    ended = gemmule("generate", tiny_run, "Ein", "Mann's")
    assert ended.code == 2
    advice = "--prompt 'Ein Mann'\"'\"'s'"
    words = f'gemmule: unexpected argument "Ein Mann\'s"; use {advice} to continue a text\n'
    assert (ended.out, ended.err) == ("", words)
    assert generate(tiny_run, "--max-new-tokens", 3, *shlex.split(advice)).startswith("Ein Mann's")


def test_a_folder_of_runs_says_which_it_holds(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("small", "over", ".unfinished"):
        shutil.copytree(tiny_run / "model", tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes.txt").touch()
    folder = tmp_path / "runs"
    ended = gemmule("generate", folder)
    told = f"MODEL {folder}: is not a model but a folder of models: over, small; name one, such as {folder / 'over'}"
    assert ended == (2, "", f"gemmule: {told}\n")
    assert gemmule("generate", tiny_run / "checkpoints").err.endswith(f"{tiny_run}/checkpoints/step-00000009\n")
    generate(tmp_path / "runs" / "over", "--max-new-tokens", 3)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + "/model"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    ended = gemmule("generate", name)
    assert ended.code == 2
    assert ended.err.startswith(f"gemmule: MODEL {name}: ")


DAMAGE = {
    "weight": lambda weights, _: weights["model.norm.weight"].view(-1)[0].fill_(math.nan),
    "many": lambda weights, _: [weight.view(-1)[0].fill_(math.inf) for weight in weights.values()],
    "large": lambda weights, _: weights["model.norm.weight"].fill_(3e38),  # finite, unlike what they make
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_that_is_not_finite_is_refused(tiny_run: Path, tmp_path: Path, damage: str) -> None:
    model = shutil.copytree(tiny_run / "model", tmp_path / "model")
    config, weights = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    weights = {name: weight.clone() for name, weight in weights.items()}
    DAMAGE[damage](weights, config)
    (model / "config.json").write_text(json.dumps(config))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    words = {
        "weight": "the model is damaged: norm.weight holds NaN or infinity; see",
        "many": "the model is damaged: embedding.weight holds NaN or infinity, and so do ",
        "large": "the model's logits are not finite: its weights or the numbers in its config.json are damaged; see",
    }
    options: list[list[object]] = [["--json"], ["--decoding", "plain"], ["--int8"], ["--temperature", 0]]
    for each in options:
        ended = gemmule("generate", model, "--max-new-tokens", 5, *each)
        assert (ended.code, ended.out) == (2, "")
        assert words[damage] in ended.err
        assert ended.err.endswith(f"`gemmule doctor {'MODEL' if damage == 'large' else model}`\n")
    doctor = gemmule("doctor", model)
    assert doctor.code == 1, "the advice leads to the fault"


def piped(command: list[str], stdout: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start a command as users do, whose Python keeps what it prints until there is enough of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=stdout, stderr=pipe, text=True, env=environment)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_to_a_full_disk_ends_in_a_sentence(tiny_run: Path) -> None:
    command = [sys.executable, "-m", "gemmule", "generate", str(tiny_run), "--max-new-tokens", "3", "--prompt", "Mia"]
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
    options = ["--prompt", "Once upon a time", "--max-new-tokens", "2000"]
    command = [sys.executable, "-m", "gemmule", "generate", str(tiny_run), *options]
    with piped(command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(9) == "Once upon"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_text_on_standard_input_that_is_not_read_is_told(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemmule.cli.generate.input_is_redirected", lambda: True)
    for options, told in (([], True), (["--prompt", "-"], False), (["--prompt", "Mia"], False)):
        ended = gemmule("generate", tiny_run, "--max-new-tokens", 1, *options, given=b"Tom found")
        assert ended.code == 0
        assert ("standard input is not read; --prompt -" in ended.err) == told


def test_standard_input_from_a_pipe_or_a_file_may_be_meant_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    for handle, redirected in (
        (reader, True),
        (os.open(__file__, os.O_RDONLY), True),
        (os.open("/dev/null", 0), False),
    ):
        with os.fdopen(handle) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert input_is_redirected() == redirected
    os.close(writer)


def test_a_path_may_begin_with_the_home_that_no_shell_expanded(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(tiny_run)
    assert gemmule("generate", "~/mine", "--max-new-tokens", 1).code == 0
    assert gemmule("export", "~/mine", "--to", "hf", "--out", "~/hf").code == 0
    assert (tmp_path / "hf" / "config.json").is_file()
