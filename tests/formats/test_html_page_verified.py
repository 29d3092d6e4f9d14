"""Pages run by wasmtime and node: logits and text of the engine on every shape, certificates, the command."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_files import SHAPES, model_of, rounded
from test_program import MOST, POSITIONS, STRINGS, gemma_like

import gemmule as package
from gemmule.errors import MissingExtra
from gemmule.evaluate import certificate as certificates
from gemmule.evaluate.certificate import certify, check_runtime
from gemmule.evaluate.page_runtime import greedy_texts, run_page
from gemmule.evaluate.wasm import WasmModel
from gemmule.formats.exports import reopen
from gemmule.formats.page import load_page, read_page, save_page
from gemmule.inference.engine import reply_to_all, stop_tokens
from gemmule.inference.requests import Request
from gemmule.inference.sampling import SamplingSettings
from gemmule.tokenizer import Tokenizer
from runs import gemmule
from tiny import some_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def wasmtime() -> None:
    pytest.importorskip("wasmtime", reason="the extra verify is not installed")


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_text_are_those_of_the_model(
    tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str, dtype: str
) -> None:
    file = tmp_path / "page.html"
    model = model_of(**SHAPES[shape] | {"max_position_embeddings": POSITIONS})
    length = 20 if model.config.vocab_size > 1000 else POSITIONS
    save_page(model, tiny_tokenizer, file, dtype, "x", None)
    held, tokens = read_page(file), some_tokens(model.config, rows=1, length=length)
    with closing(WasmModel(held.wasm, held.packed, length)) as wasm:
        given = wasm.logits(tokens[0].tolist())
    same = rounded(model, dtype)
    with torch.no_grad():
        expected = same(tokens)[0].numpy()
    assert np.abs(given - expected).max() < MOST[dtype]
    assert (given.argmax(1) == expected.argmax(1)).all()
    prompt = tokens[0, :11].tolist()
    stops = stop_tokens(tiny_tokenizer)
    request = Request(tuple(prompt), 60, SamplingSettings(temperature=0), 0, stops=stops)
    texts = greedy_texts(file, prompt, 60, [*stops])
    assert texts == dict.fromkeys(texts, reply_to_all(same, [request])[0])


@pytest.mark.parametrize("convention", ["ours", "Google's"])
def test_texts_are_encoded_as_the_tokenizer_does(tiny_tokenizer: Tokenizer, tmp_path: Path, convention: str) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    tokenizer = tiny_tokenizer if convention == "ours" else gemma_like(tiny_tokenizer)
    save_page(model_of(vocab_size=400), tokenizer, tmp_path / "page.html", "int8", "x", None)
    texts = [*STRINGS, "the end\n\n\n\nof the end", "a  b   c", "<eos>!<eo><eos", "\U0001f984\u0301\ufeff"]
    assert run_page(str(tmp_path / "page.html"), [2], texts)[1] == [tokenizer.encode(text) for text in texts]


def test_the_command_writes_verifies_and_shows(tiny_run: Path, tmp_path: Path) -> None:
    for to, out in (("html", tmp_path / "story.html"), ("web", tmp_path / "site")):
        ended = gemmule("export", tiny_run, "--to", to, "--out", out, "--verify", "--json")
        assert ended.code == 0, ended.err
        told = json.loads(ended.out)
        assert told["passed"]
        assert told["dtype"] == "int8"
        assert told["runtime"]["name"] == "wasmtime"
        texts = ["wasmtime", "node"] if shutil.which("node") else ["wasmtime"]
        assert all(f"tokens in {name}" in told["greedy_agreement"] for name in texts)
        page = out / "index.html" if to == "web" else out
        proof = out / "certificate.json" if to == "web" else tmp_path / "story.certificate.json"
        assert json.loads(proof.read_text()) == {key: told[key] for key in json.loads(proof.read_text())}
        assert "wasmtime " in page.read_text(encoding="utf-8").split('id="certificate">')[1].split("</script>")[0]
        content = page.read_bytes()
        again = gemmule("export", tiny_run, "--to", to, "--out", out, "--verify")
        assert again.code == 0, again.err
        assert page.read_bytes() == content
        page.write_bytes(content.replace(b"Everything is", b"Nothing is"))
        assert gemmule("export", tiny_run, "--to", to, "--out", out, "--verify").code == 2


def test_without_node_the_certificate_says_so(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = model_of(), tmp_path / "page.html"
    save_page(model, tiny_tokenizer, file, "int8", "x", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    given = certify(file, "wasmtime", "int8", (model, tiny_tokenizer), reopen(file, tiny_tokenizer))
    assert given["passed"]
    assert given["tokenizer_agreement"] == certificates.NOT_COMPARED
    assert "node is not installed" in file.read_text(encoding="utf-8")


def test_another_model_in_the_page_fails(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, file = model_of(), tmp_path / "page.html"
    save_page(model_of(query_pre_attn_scalar=99), tiny_tokenizer, file, "int8", "x", None)
    given = certify(file, "wasmtime", "int8", (model, tiny_tokenizer), (model, tiny_tokenizer))
    assert not given["passed"]
    assert "FAILED" in file.read_text(encoding="utf-8")


def test_a_page_is_opened_as_it_was_exported(tiny_run: Path, tmp_path: Path) -> None:
    model, tokenizer = package.load(tiny_run)
    save_page(model, tokenizer, tmp_path / "page.html", "f32", "A name", None)
    packed = load_page(tmp_path / "page.html")
    assert packed.name == "A name"
    assert torch.equal(packed.model.embedding.weight, model.embedding.weight)


def test_without_wasmtime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"gemmule\[verify\]"):
        check_runtime("wasmtime")
