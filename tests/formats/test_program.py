"""The C program: logits, tokens and text of the engine, on every shape; sentences for what it cannot read."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from packed_files import SHAPES, altered, forged, model_of, rounded

from gemmule.evaluate.certificate import difficult_strings
from gemmule.formats.packed import load_packed, save_packed
from gemmule.formats.program import compile_program, write_sources
from gemmule.inference.engine import generate
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from sentences import SENTENCES
from tiny import some_tokens

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")

POSITIONS = 300
# The largest difference of logits, whose standard deviation is about 1. In int8 activations have 16 bits, and weights
# that are drawn at random amplify their rounding; of the trained model of `make story` it is 0.001.
MOST = {"f32": 1e-4, "bf16": 1e-4, "int8": 5e-3}


@pytest.fixture(scope="session")
def program(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled for this machine."""
    folder = tmp_path_factory.mktemp("program")
    write_sources(model_of(), tiny_tokenizer, folder, "int8", "x")
    return compile_program(folder)


@pytest.fixture(scope="session")
def native_program(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for this processor, as the engine's own step is compiled: logits are the same to the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "cc -march=native")
        return compile_program(Path(shutil.copytree(program.parent, tmp_path_factory.mktemp("native") / "x")))


@pytest.fixture(scope="session")
def sanitized(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same under AddressSanitizer and UndefinedBehaviorSanitizer; skipped where the compiler lacks them."""
    target = tmp_path_factory.mktemp("sanitized") / "story"
    flags = ["-O1", "-g", "-std=gnu11", "-ffp-contract=off", "-fsanitize=address,undefined,float-cast-overflow"]
    flags += ["-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]
    command = ["cc", *flags, "-o", str(target), "story.c", "draw.c", "system.c", "-lm"]
    if subprocess.run(command, cwd=program.parent, capture_output=True, check=False).returncode:
        pytest.skip("the C compiler here has no sanitizers")
    return target


def run(program: Path, *options: object, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # memory goes with the process
    command = [str(program), *map(str, options)]
    return subprocess.run(command, input=given, capture_output=True, timeout=120, check=False, env=environment)


def succeed(program: Path, *options: object, given: bytes = b"") -> bytes:
    ended = run(program, *options, given=given)
    assert (ended.returncode, ended.stderr) == (0, b"")
    return ended.stdout


def logits_of(program: Path, packed: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    out = succeed(program, packed, "--logits", given=" ".join(map(str, ids)).encode())
    return np.frombuffer(out, "<f4").reshape(len(ids), -1)


def encoded(program: Path, packed: Path, texts: list[str]) -> list[list[int]]:
    out = succeed(program, packed, "--encode", given=b"".join(text.encode() + b"\0" for text in texts))
    return [[*map(int, line.split())] for line in out.decode().splitlines()]


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_model(
    program: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str, dtype: str
) -> None:
    model = model_of(**SHAPES[shape] | {"max_position_embeddings": POSITIONS})
    length = 20 if model.config.vocab_size > 1000 else POSITIONS
    save_packed(model, tiny_tokenizer, tmp_path / "model.packed", dtype, "x")
    tokens = some_tokens(model.config, rows=1, length=length)
    with torch.no_grad():
        expected = rounded(model, dtype)(tokens)[0].numpy()
    given = logits_of(program, tmp_path / "model.packed", tokens[0].tolist())
    assert np.abs(given - expected).max() < MOST[dtype]
    assert (given.argmax(1) == expected.argmax(1)).all()


STRINGS = [
    *difficult_strings(1000),
    "",
    "<bos>x<eos>",
    "<start_of_turn>user",
    "\u2581\u2581the",
    "\x01\x7f",
    "\U0010ffff",
]
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def gemma_like(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer in Google's conventions: U+2581 for a space, added tokens of newlines and of words."""
    model = tokenizer.description["model"]

    def marked(piece: str) -> str:
        return piece.replace(" ", "\u2581")

    vocabulary = {marked(piece): number for piece, number in model["vocab"].items()}
    ids = dict(vocabulary)
    words = ["\n\n", "\n\n\n", "the", "the end", "\u2581\u2581", "<eo", "<eos>!", "end_of"]
    for word in words:
        ids.setdefault(word, len(ids))
    return altered(
        tokenizer,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        pre_tokenizer={
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        added_tokens=tokenizer.description["added_tokens"]
        + [{"id": ids[word], "content": word} | ADDED for word in words],
        model_vocab=vocabulary,
        model_merges=[[marked(left), marked(right)] for left, right in model["merges"]],
    )  # fmt: skip


@pytest.mark.parametrize("convention", ["ours", "Google's"])
def test_texts_are_encoded_as_the_tokenizer_does(
    program: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, convention: str
) -> None:
    tokenizer = tiny_tokenizer if convention == "ours" else gemma_like(tiny_tokenizer)
    save_packed(model_of(vocab_size=400), tokenizer, tmp_path / "model.packed", "int8", "x")
    texts = [*STRINGS, "the end\n\n\n\nof the end", "a  b   c", "<eos>!<eo><eos", " ".join(SENTENCES)]
    assert encoded(program, tmp_path / "model.packed", texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("dtype", ["f32", "int8"])
@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.7, "min_p": 0.05},
    ],
    ids=str,
)
def test_a_seed_tells_what_the_engine_tells_with_it(
    native_program: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, rules: dict[str, Any], dtype: str
) -> None:
    model = model_of(max_position_embeddings=200)
    save_packed(model, tiny_tokenizer, tmp_path / "model.packed", dtype, "x")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ({"min_p": 0} | rules).items()]
    for seed, stop in ((7, []), (2**64 - 1, ["e", "th", "\ufffd"])):
        events = [*generate(rounded_once(model, dtype), tiny_tokenizer, "Mia", seed=seed, stop=stop, **rules)]
        given: list[Any] = [native_program, tmp_path / "model.packed", "--prompt", "Mia", "--seed", seed, *options]
        out = succeed(*given, *(word for text in stop for word in ("--stop", text)))
        assert out.decode() == "Mia" + "".join(event.text for event in events) + "\n"
        if not stop:
            assert [*map(int, succeed(*given, "--ids").split())] == [event.token for event in events]


def rounded_once(model: Gemma3, dtype: str) -> Gemma3:
    is_rounded = not isinstance(model.embedding.weight, torch.nn.Parameter)
    return model if is_rounded else rounded(model, dtype)


@pytest.fixture
def packed(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_packed(model_of(num_hidden_layers=3), tiny_tokenizer, tmp_path / "model.packed", "int8", "x")
    return tmp_path / "model.packed"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--temperature", "warm"], "--temperature warm: must be a number from 0 to 1e+300"),
        (["--tokens=0"], "--tokens 0: must be a whole number from 1 to 1e+09"),
        (["--tokens", "1.5"], "--tokens 1.5: must be a whole number from 1 to 1e+09"),
        (["--top-p", "0"], "--top-p 0: must be a number from 1e-300 to 1"),
        (["--min-p", "1"], "--min-p 1: must be a number from 0 to 1"),
        (["--seed", "-1"], "--seed -1: must be a whole number from 0 to 2^64 - 1"),
        (["--seed", "18446744073709551616"], "must be a whole number from 0 to 2^64 - 1"),
        (["--stop", ""], "--stop: needs a text"),
        (["--what", "x"], "--what: no such option; see --help"),
        (["--prompt"], "--prompt: needs a value; see --help"),
        (["a prompt"], "a prompt: one packed file is read, and "),
        (["--prompt", "word " * 40], "tokens; this model's max_position_embeddings is 64"),
        (["--prompt", b"\xff"], "the prompt is not UTF-8 text: byte 0 of it"),
    ],
)
def test_options_that_cannot_be_are_refused(program: Path, packed: Path, options: list[Any], sentence: str) -> None:
    ended = subprocess.run([program, packed, *options], capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert sentence in ended.stderr.decode()
    assert ended.stderr.count(b"\n") == 1


def test_a_prompt_may_come_from_standard_input(program: Path, packed: Path) -> None:
    given = ["--prompt", "-", "--temperature", "0", "--tokens", "5"]
    windows = succeed(program, packed, *given, given=b"\xef\xbb\xbfMia saw\r\nTom\r\n")
    assert windows == succeed(program, packed, *given, given=b"Mia saw\nTom\n")
    assert windows.startswith(b"Mia saw\nTom")
    assert b"--temperature X" in succeed(program, "--help")


def test_files_that_are_none_are_refused_by_name(program: Path, packed: Path, tmp_path: Path) -> None:
    whole, other = packed.read_bytes(), tmp_path / "other"
    for content, sentence in (
        (b"", "is not a packed file"),
        (b"GGUF" * 30, "is not a packed file"),
        (whole[:7], "is not a packed file"),
        (whole[:63], "is truncated"),
        (whole[:-1], "is truncated"),
        (whole + b"x", "is damaged"),
        (whole[:8] + b"\2" + whole[9:], "is a packed file of another version"),
        (whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], "is damaged: its SHA-256"),
    ):
        other.write_bytes(content)
        ended = run(program, other)
        assert (ended.returncode, ended.stdout) == (2, b"")
        assert f"{other}: {sentence}" in ended.stderr.decode()
    for name, sentence in ((tmp_path / "none", "none: cannot be read"), (tmp_path, ": cannot be read")):
        ended = run(program, name)
        assert (ended.returncode, ended.stdout) == (2, b"")
        assert sentence in ended.stderr.decode()
    assert "name a packed file" in run(program).stderr.decode()


HOSTILE: list[dict[str, Any]] = [
    {"vocab_size": 2**20}, {"vocab_size": 1}, {"vocab_size": -1}, {"vocab_size": 1e300}, {"vocab_size": "380"},
    {"hidden_size": 2**20}, {"head_dim": 2**20}, {"head_dim": 7}, {"num_attention_heads": 3}, {"dtype": "f32"},
    {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20}, {"dtype": "int4"},
    {"num_hidden_layers": 4000}, {"num_hidden_layers": 2}, {"layer_kinds": [0, 2, 1]}, {"layer_kinds": []},
    {"layer_kinds": "000"}, {"windows": [2**53, 3]}, {"windows": [1]}, {"rope_factors": [0.0, 1.0]}, {"tied": 0},
    {"num_merges": 2**29}, {"num_merges": 2**28}, {"num_characters": 2**28}, {"num_added_tokens": 2**28},
    {"token_text_bytes": 0}, {"token_text_bytes": 2**32}, {"added_text_bytes": 0}, {"bos": 380}, {"bos": 2**40},
    {"stops": [2**63]}, {"stops": "x"}, {"stops": ["1", [2]]}, {"arrays": {}}, {"arrays": ...}, {"name": '":[' * 99},
    {"max_position_embeddings": 2**53}, {"max_position_embeddings": 1}, {"query_pre_attn_scalar": 0},
    {"rms_norm_eps": -1.0}, {"embedding_scale": 1e-320}, {"name": "\\\"vocab_size\\\":[1"}, {"parameters": None},
]  # fmt: skip


@pytest.mark.slow
def test_no_file_leads_the_program_astray(sanitized: Path, packed: Path, tmp_path: Path) -> None:
    whole, path = packed.read_bytes(), tmp_path / "hostile"
    length = int.from_bytes(whole[56:64], "little")
    header = json.loads(whole[64 : 64 + length])
    files = [forged(whole, **changes) for changes in HOSTILE]
    for name, offsets in header["arrays"].items():
        for offset in (0, 1, 64, offsets[0] + 64, len(whole) - 64, len(whole), 2**62, -64, "x", None):
            moved = {name: [offset, *offsets[1:]]}
            files.append(forged(whole, arrays=header["arrays"] | moved))
        start = 64 + length + offsets[0]
        for content in (b"\xff" * 256, b"\0" * 256, b"\x7f\xff" * 128):
            files.append(forged(whole[:start] + content + whole[start + 256 :]))
    files += [whole[:end] for end in range(0, 200, 7)]
    texts = b"".join(text.encode() + b"\0" for text in ["Mia saw\n\nTom", "\U0001f984", "<eos>", "zz" * 300])
    codes = {0: 0, 2: 0}
    for number, content in enumerate(files):
        path.write_bytes(content)
        for options, given in (
            (["--tokens", 9, "--seed", number], b""),
            (["--encode"], texts),
            (["--logits"], b"1 2 3 379 5"),
        ):
            ended = run(sanitized, path, *options, given=given)
            assert ended.returncode in codes, (number, options, ended.stderr.decode(errors="replace")[-3000:])
            codes[ended.returncode] += 1
    assert codes[0] >= 100
    assert codes[2] >= 300


@pytest.mark.slow
def test_the_program_does_nothing_undefined(sanitized: Path, packed: Path) -> None:
    assert encoded(sanitized, packed, STRINGS)
    for options in ([], ["--temperature", 0], ["--top-k", 5, "--top-p", 0.5], ["--stop", "a", "--stop", "the"]):
        succeed(sanitized, packed, "--seed", 1, *options)
    for given in (b"", b"\xff", b"a\xc3", "\u2581".encode(), b"x" * 3000):
        run(sanitized, packed, "--prompt", "-", given=given)
    assert b"AddressSanitizer" not in run(sanitized, packed, "--logits", given=b"99999999999 -5 x").stderr


@pytest.mark.slow
def test_the_makefile_makes_the_program(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    write_sources(model_of(), tiny_tokenizer, tmp_path, "int8", "x")
    for options in ([], ["FAST=1", "-B"]):
        subprocess.run(["make", *options], cwd=tmp_path, check=True, capture_output=True, env=os.environ | {"CC": "cc"})
        ids = [1, 2, 3]
        expected = load_packed(tmp_path / "model.packed").model(torch.tensor([ids]))[0].detach().numpy()
        assert np.abs(logits_of(tmp_path / "story", tmp_path / "model.packed", ids) - expected).max() < 2e-3
