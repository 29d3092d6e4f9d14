import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemmule as package
from gemmule.evaluate import certificate
from gemmule.formats import exports, k_quants, program
from gemmule.formats.gguf_file import GgufFile
from gemmule.formats.packed import load_packed
from gemmule.tokenizer.chat import CHAT_TEMPLATE
from runs import gemmule


def metadata(file: Path) -> dict[str, object]:
    with GgufFile(file) as opened:
        return opened.metadata


needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the gguf library is not installed")


@needs_gguf
def test_a_gguf_file_is_a_model_for_every_command(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    ended = gemmule("export", tiny_run, "--to", "gguf", "--out", out, "--dtype", "f32")
    assert (ended.code, ended.out) == (0, "")
    note, written = ended.err.splitlines()
    assert note.startswith("note: sliding_window_pattern = 3 is supported by llama.cpp since January 2026")
    assert written == f"wrote {out}: f32, {out.stat().st_size / 1e6:.1f} MB"
    assert metadata(out)["general.name"] == tiny_run.name
    options = ["--max-new-tokens", 12, "--temperature", 0, "--prompt", "Mia found"]
    assert gemmule("generate", out, *options).out == gemmule("generate", tiny_run, *options).out
    imported = gemmule("import", out, "--out", tmp_path / "back")
    assert imported.code == 0, imported.err
    assert gemmule("generate", tmp_path / "back", *options).out == gemmule("generate", tiny_run, *options).out


def test_a_folder_is_stored_as_asked(tiny_run: Path, tmp_path: Path) -> None:
    ended = gemmule("export", tiny_run, "--to", "hf", "--out", tmp_path / "out", "--dtype", "bf16", "--json")
    assert ended.code == 0, ended.err
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    told = {"artefact": str(tmp_path / "out"), "format": "hf", "dtype": "bf16", "bytes": size}
    assert json.loads(ended.out) == told
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sum(weight.numel() for weight in weights.values()) == sum(
        parameter.numel() for parameter in package.load(tiny_run)[0].parameters()
    )


@needs_gguf
def test_ollama_gets_a_file_and_its_description(tiny_run: Path, tmp_path: Path) -> None:
    ended = gemmule("export", tiny_run, "--to", "ollama", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    description = (tmp_path / "out" / "Modelfile").read_text()
    assert description.startswith('FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\n')
    assert "stop" not in description
    written, advice = ended.err.splitlines()[-2:]
    assert written.startswith(f"wrote {tmp_path / 'out' / 'model.gguf'}: bf16, ")
    assert advice == f"add it to Ollama:  ollama create out -f {tmp_path / 'out' / 'Modelfile'}"


@needs_gguf
def test_ollama_is_told_of_a_chat(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert gemmule("export", tmp_path / "chat", "--to", "ollama", "--out", tmp_path / "out").code == 0
    assert metadata(tmp_path / "out" / "model.gguf")["tokenizer.chat_template"] == CHAT_TEMPLATE
    description = (tmp_path / "out" / "Modelfile").read_text()
    assert "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n" in description
    assert 'PARAMETER stop "<end_of_turn>"' in description


@needs_gguf
def test_another_chat_template_is_left_to_ollama(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("<|im_start|>{{ messages }}<|im_end|>")
    ended = gemmule("export", tmp_path / "chat", "--to", "ollama", "--out", tmp_path / "out")
    assert "note: the chat template is not Gemma's; Ollama uses the most similar one that it knows" in ended.err
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()


@needs_gguf
def test_name_and_license_go_from_format_to_format(tiny_run: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_run / "model", tmp_path / "source")
    (source / "README.md").write_text(
        "---\nlanguage: en\nlicense: gemma\nmodel_name: 'Gemma 3 4m It'\n---\n# A story\n"
    )
    note = ": gemma; it also applies to this copy\n"
    expected = {"general.name": "Gemma 3 4m It", "general.license": "gemma", "general.type": "model"}
    steps = [("export", "--to", "hf"), ("export", "--to", "gguf"), ("import",), ("export", "--to", "ollama")]
    for number, (command, *options) in enumerate(steps):
        out = tmp_path / str(number)
        ended = gemmule(command, source, *options, "--out", out)
        assert (ended.code, ended.err.count(f"{source}{note}")) == (0, 1), ended.err
        source = out
    for file in (tmp_path / "1", tmp_path / "3" / "model.gguf"):
        assert metadata(file).items() >= expected.items()
    assert (tmp_path / "2" / "README.md").read_text() == "---\nlicense: gemma\nmodel_name: Gemma 3 4m It\n---\n"
    assert "license of" not in gemmule("export", tiny_run, "--to", "hf", "--out", tmp_path / "mine").err
    assert not (tmp_path / "mine" / "README.md").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--to", "hf", "--dtype", "q8_0"], "--dtype q8_0: a Hugging Face folder takes f32, f16, bf16"),
        (
            ["--to", "gguf", "--dtype", "int8"],
            "--dtype int8: GGUF takes f32, f16, bf16, q8_0, ",
        ),
        (["--to", "c", "--dtype", "q8_0"], "--dtype q8_0: a C program takes f32, bf16, int8"),
        (["--to", "program", "--dtype", "f16"], "--dtype f16: a C program takes f32, bf16, int8"),
        (["--to", "c", "--target", "linux-x86_64"], "--target linux-x86_64: is for --to program, and this is --to c"),
        (
            ["--to", "program", "--target", "amiga"],
            "'amiga' is not one of 'linux-x86_64', 'linux-aarch64', 'macos-aarch64', 'macos-x86_64', 'windows-x86_64'",
        ),
        (["--to", "onnx"], "'onnx' is not one of 'hf', 'gguf', 'ollama', 'c', 'program'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tiny_run: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    ended = gemmule("export", tiny_run, *options, "--out", tmp_path / "out")
    assert ended.code == 2
    assert sentence in " ".join(ended.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_paths_that_are_not_utf_8_are_used_where_programs_open_them(tiny_run: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    for command in (["export", tiny_run, "--to", "hf"], ["import", tiny_run / "model"]):
        ended = gemmule(*command, "--out", odd)
        assert ended.code == 2
        assert ended.err.endswith(": the path of a model or run must be UTF-8; rename it\n")
    assert gemmule("export", tiny_run, "--to", "gguf", "--out", odd).code == 0
    assert metadata(odd)["general.name"] == tiny_run.name
    assert gemmule("export", odd, "--to", "gguf", "--out", tmp_path / "again").code == 0
    shutil.copytree(tiny_run / "model", tmp_path / os.fsdecode(b"run\xe9"))
    ended = gemmule("generate", tmp_path / os.fsdecode(b"run\xe9"))
    assert ended.code == 2
    assert ": the path of a model or run must be UTF-8; rename it" in ended.err


def test_what_is_there_is_not_overwritten(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    ended = gemmule("export", tiny_run, "--to", "gguf", "--out", tmp_path / "thesis")
    assert ended.code == 2
    assert f"--out {tmp_path / 'thesis'}: already exists; choose a new file or folder" in ended.err
    assert (tmp_path / "thesis").read_text() == "mine"


def test_a_model_that_holds_nan_is_refused_by_its_name(tiny_run: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_run / "model", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, source / "model.safetensors")
    ended = gemmule("export", source, "--to", "hf", "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (2, "")
    damage = "the model is damaged: norm.weight holds NaN or infinity"
    assert ended.err == f"gemmule: {damage}; see `gemmule doctor {source}`\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "library", "advice"),
    [
        (
            ["--to", "hf", "--verify"],
            "transformers",
            "transformers, which is not installed: pip install 'gemmule[parity]'",
        ),
        (
            ["--to", "gguf", "--verify"],
            "llama_cpp",
            "llama-cpp-python, which is not installed: pip install 'gemmule[llama]'",
        ),
        (["--to", "gguf", "--dtype", "q4_k_m"], "llama_cpp", "llama-cpp-python, which is not installed: pip install"),
        (["--to", "gguf"], "gguf", "gguf, which is not installed: pip install 'gemmule[gguf]'"),
        (
            ["--to", "program", "--target", "linux-x86_64"],
            "ziglang",
            "--target linux-x86_64, unlike --to c, needs the library ziglang, which is not installed: pip install "
            "'gemmule[program]'",
        ),
    ],
)
def test_a_missing_library_is_told_before_anything_is_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], library: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for module in (certificate, k_quants, program):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == library else find_spec(name))
    ended = gemmule("export", tmp_path / "no model", *options, "--out", tmp_path / "out")
    assert ended.code == 2
    assert advice in ended.err
    assert list(tmp_path.iterdir()) == []


def accepting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every runtime answer as we do, for tests of what is around it."""

    def answer(runtime: str, artefact: Path, ids: list[int], strings: list[str]) -> object:
        model, tokenizer = package.load(artefact)
        logits = model.float()(torch.tensor([ids]))[0].detach().numpy()
        return {"encoded": [tokenizer.encode(text) for text in strings], "version": "1"}, logits

    monkeypatch.setattr(certificate, "check_runtime", lambda _: None)
    monkeypatch.setattr(certificate, "_ask", answer)
    monkeypatch.setattr(certificate, "STRINGS", 3)


@needs_gguf
@pytest.mark.parametrize("to", ["hf", "gguf", "ollama"])
def test_an_export_can_be_verified_later(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    accepting(monkeypatch)
    out = tmp_path / "out"
    command = ["export", tiny_run, "--to", to, "--out", out]
    assert gemmule(*command).code == 0
    before = {file: file.read_bytes() for file in out.rglob("*")} or {out: out.read_bytes()}
    for _ in range(2):  # the certificate of the first is no part of what is compared
        ended = gemmule(*command, "--verify")
        assert ended.code == 0, ended.err
        assert "certificate.json" in ended.err
        assert "wrote" not in ended.err
    assert all(file.read_bytes() == content for file, content in before.items())
    assert len(list(tmp_path.iterdir())) == (2 if to == "gguf" else 1), "temporary folders are gone"
    others = gemmule(*command, "--verify", "--dtype", "f16")
    assert others.code == 2
    assert "already exists, and " in others.err
    assert " differs from this export; choose a new file or folder" in others.err


def test_logits_that_are_not_numbers_fail_the_certificate(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepting(monkeypatch)
    answer = certificate._ask

    def broken(*question: object) -> object:
        told, logits = answer(*question)  # type: ignore[arg-type]
        logits[3, 7] = float("nan")
        return told, logits

    monkeypatch.setattr(certificate, "_ask", broken)
    ended = gemmule("export", tiny_run, "--to", "hf", "--out", tmp_path / "out", "--verify", "--json")
    assert (ended.code, ended.out) == (1, "")
    assert f"{tmp_path / 'out'}: transformers computes logits from it that are NaN or infinite" in ended.err


@pytest.mark.slow
def test_a_verified_export_has_a_certificate(tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path / "out"
    ended = gemmule("export", tiny_run, "--to", "hf", "--out", out, "--dtype", "f32", "--verify", "--json")
    assert ended.code == 0, ended.err
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["passed"]
    assert certificate["argmax_agreement"] == 1
    assert certificate["largest_logit_difference"] <= 1e-4
    assert certificate["tokenizer_agreement"] == "1000 of 1000 strings"
    assert sorted(certificate["sha256"]) == sorted(f.name for f in out.iterdir() if f.name != "certificate.json")
    assert certificate["runtime"]["name"] == "transformers"
    assert json.loads(ended.out)["passed"] is True


@pytest.mark.slow
def test_a_certificate_that_fails_makes_the_command_fail(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    whole = exports.reopen

    def tampered(*arguments: Any) -> object:
        model, tokenizer = whole(*arguments)
        model.blocks[0].mlp.down.weight.data *= 3
        return model, tokenizer

    monkeypatch.setattr(exports, "reopen", tampered)
    out = tmp_path / "out"
    ended = gemmule("export", tiny_run, "--to", "hf", "--out", out, "--dtype", "f32", "--verify")
    assert ended.code == 1
    assert f"{out}: the certificate failed; see {out / 'certificate.json'}" in ended.err
    assert json.loads((out / "certificate.json").read_text())["passed"] is False


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")


def test_a_program_needs_a_compiler_or_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    missing = "no C compiler (no-such-compiler) was found; install one,"
    for command, sentence in (
        (["--to", "program"], f"--to program: {missing} name a --target, or use --to c, which needs none"),
        (["--to", "c", "--verify"], f"--verify: {missing} or leave --verify out"),
    ):
        ended = gemmule("export", tmp_path / "no model", *command, "--out", tmp_path / "out")
        assert ended.code == 2
        assert sentence in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_cannot_run_here_is_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "find_spec", lambda _: True)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    options = ["--to", "program", "--target", "windows-x86_64", "--verify"]
    ended = gemmule("export", tmp_path / "no model", *options, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "--verify runs the program, and this machine, linux-" in ended.err
    assert "cannot run windows-x86_64; verify it there" in ended.err


@needs_compiler
def test_a_compiler_that_fails_is_quoted(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc --no-such-option")
    ended = gemmule("export", tiny_run, "--to", "program", "--out", tmp_path / "out")
    assert ended.code == 2
    assert "cc did not compile the program: " in ended.err
    assert "no-such-option" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_not_byte_pair_encoding_is_not_packed(tiny_run: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_run / "model", tmp_path / "source")
    description = json.loads((source / "tokenizer.json").read_text())
    description["model"]["byte_fallback"] = False
    (source / "tokenizer.json").write_text(json.dumps(description))
    ended = gemmule("export", source, "--to", "c", "--out", tmp_path / "out")
    assert ended.code == 2
    assert "the model's tokenizer is byte-pair encoding without byte fallback; only byte-pair encoding " in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "bf16", "f32"])
@pytest.mark.parametrize("to", ["c", "program"])
def test_a_verified_program_has_a_certificate(tiny_run: Path, tmp_path: Path, to: str, dtype: str) -> None:
    out = tmp_path / "out"
    ended = gemmule("export", tiny_run, "--to", to, "--out", out, "--dtype", dtype, "--verify", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(exports.certificate_path(out).read_text())
    assert told["passed"]
    assert told["argmax_agreement"] == 1
    assert told["largest_logit_difference"] <= (2e-3 if dtype == "int8" else 1e-4)
    assert told["tokenizer_agreement"] == "1000 of 1000 strings"
    same, _, total, _ = told["greedy_agreement"].split()
    assert same == total
    assert told["positions"] > 2 * told["window"]
    again = gemmule("export", tiny_run, "--to", to, "--out", out, "--dtype", dtype, "--verify")
    assert again.code == 0, again.err
    if to == "program":
        prompt = ["--prompt", "Mia", "--seed", "3"]
        printed = subprocess.run([out, *prompt], capture_output=True, text=True, check=True).stdout
        options = ["--int8"] if dtype == "int8" else []
        if dtype != "bf16":
            assert printed == gemmule("generate", tiny_run, *prompt, *options).out


@pytest.mark.slow
@pytest.mark.parametrize("target", program.TARGETS)
def test_a_program_is_made_for_every_target(tiny_run: Path, tmp_path: Path, target: str) -> None:
    if find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed: pip install 'gemmule[program]'")
    ended = gemmule("export", tiny_run, "--to", "program", "--target", target, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    magic = {"linux": b"\x7fELF", "macos": b"\xcf\xfa\xed\xfe", "windows": b"MZ"}[target.partition("-")[0]]
    assert (tmp_path / "out").read_bytes().startswith(magic)
    assert os.access(tmp_path / "out", os.X_OK)
    assert load_packed(tmp_path / "out").dtype == "int8"
