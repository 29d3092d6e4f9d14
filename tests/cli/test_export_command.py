import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

import gemmule as package
from runs import gemmule

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the gguf library is not installed")


@needs_gguf
def test_a_gguf_file_is_a_model_for_every_command(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    ended = gemmule("export", tiny_run, "--to", "gguf", "--out", out, "--dtype", "f32")
    assert (ended.code, ended.out) == (0, "")
    assert f"{out} is written" in ended.err
    assert "gemma3.attention.sliding_window_pattern = 3: to a llama.cpp that does not know this key" in ended.err
    options = ["--max-new-tokens", 12, "--temperature", 0, "--prompt", "Mia found"]
    assert gemmule("generate", out, *options).out == gemmule("generate", tiny_run, *options).out
    imported = gemmule("import", out, "--out", tmp_path / "back")
    assert imported.code == 0, imported.err
    assert gemmule("generate", tmp_path / "back", *options).out == gemmule("generate", tiny_run, *options).out


def test_a_folder_is_stored_as_asked(tiny_run: Path, tmp_path: Path) -> None:
    ended = gemmule("export", tiny_run, "--to", "hf", "--out", tmp_path / "out", "--dtype", "bf16", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {"artefact": str(tmp_path / "out"), "format": "hf", "dtype": "bf16"}
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
    assert f"ollama create out -f {tmp_path / 'out' / 'Modelfile'}" in ended.err


@needs_gguf
def test_ollama_is_told_of_a_chat(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "chat")
    config = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    assert gemmule("export", tmp_path / "chat", "--to", "ollama", "--out", tmp_path / "out").code == 0
    description = (tmp_path / "out" / "Modelfile").read_text()
    assert "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n" in description
    assert 'PARAMETER stop "<end_of_turn>"' in description


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--to", "hf", "--dtype", "q8_0"], "--dtype q8_0: a Hugging Face folder takes f32, f16, bf16"),
        (["--to", "onnx"], "'onnx' is not one of 'hf', 'gguf', 'ollama'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tiny_run: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    ended = gemmule("export", tiny_run, *options, "--out", tmp_path / "out")
    assert ended.code == 2
    assert sentence in " ".join(ended.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    ended = gemmule("export", tiny_run, "--to", "gguf", "--out", tmp_path / "thesis")
    assert ended.code == 2
    assert f"--out {tmp_path / 'thesis'}: is there already; name a new file or folder" in ended.err
    assert (tmp_path / "thesis").read_text() == "mine"


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
    from gemmule.formats import exports

    whole = exports.reopen

    def tampered(artefact: Path) -> object:
        model, tokenizer = whole(artefact)
        model.blocks[0].mlp.down.weight.data *= 3
        return model, tokenizer

    monkeypatch.setattr(exports, "reopen", tampered)
    out = tmp_path / "out"
    ended = gemmule("export", tiny_run, "--to", "hf", "--out", out, "--dtype", "f32", "--verify")
    assert ended.code == 1
    assert f"{out}: the certificate failed; see {out / 'certificate.json'}" in ended.err
    assert json.loads((out / "certificate.json").read_text())["passed"] is False
